"""Gloo ranks for tests: forks of one process, since imports take most of the time.

A test calls ``script`` on a file of its own, whose main part calls ``ranks``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def script(path: Path, *arguments: object, seconds: float = 300) -> str:
    """What a worker said; all of its ranks are killed if it takes too long."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    worker = subprocess.Popen(
        [sys.executable, str(path), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    try:
        output = worker.communicate(timeout=seconds)[0]
    finally:
        if worker.returncode is None:
            os.killpg(worker.pid, signal.SIGKILL)
    assert worker.returncode == 0, output
    return output


def ranks(work: Callable[[int], None], store: str, world: int = 2) -> None:
    """Fork ``world`` ranks that each do ``work(rank)``; exits with 1 if one of them fails."""
    children = [_fork(work, number, store, world) for number in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(1)


def _fork(work: Callable[[int], None], number: int, store: str, world: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _join(number, store, world)
        work(number)
        dist.barrier()  # none goes while another may still read from it
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # gloo's threads, where they are still ending, can abort an interpreter


def _join(number: int, store: str, world: int) -> None:
    torch.set_num_threads(1)
    # what a launcher sets; the group itself meets in a file, so that no port is needed
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=number,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
