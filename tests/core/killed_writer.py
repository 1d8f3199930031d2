"""Writes checkpoints and dies; test_state_writing runs it, because a kill needs a process."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from sparing.core import state
from sparing.core.errors import RunError
from sparing.core.state import Checkpoints

CALLS = (
    (os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
    (state, "save_file"), (state, "_write"),
)  # fmt: skip


def write(checkpoints: Checkpoints, step: int, value: int) -> None:
    checkpoints.write(step, {"w": torch.full((2000,), float(value))}, {"value": value})


def die_at(call: int) -> None:
    """From now on, the ``call``-th call that touches the disk is this process's last."""
    left = call

    def deadly(name, function):
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                if name == "save_file":  # die with the file half written
                    Path(args[1]).write_bytes(b"\x10" * 1000)
                if name == "_write":
                    Path(args[0]).write_text(args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for owner, name in CALLS:
        setattr(owner, name, deadly(name, getattr(owner, name)))


def check(checkpoints: Checkpoints) -> int:
    newest = checkpoints.newest()
    assert newest is not None, "no checkpoint is left"
    _, back, meta = newest
    assert back["w"].eq(meta["value"]).all(), "weights of one state beside the meta of another"
    return int(meta["value"])


def kill(directory: Path) -> dict[str, int]:
    report = {"stages": 0, "random": 0, "old": 0, "new": 0}
    # twice over: to a new step, and in place of the same step
    for fresh in (True, False):
        checkpoints = Checkpoints(directory / f"fresh-{fresh}")
        write(checkpoints, 1, 1)
        value = 1
        for call in range(1, 100):
            child = os.fork()
            if child == 0:
                die_at(call)
                write(checkpoints, value + 1 if fresh else 1, value + 1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = check(checkpoints)
            assert found in (value, value + 1)
            report["new" if found > value else "old"] += 1
            value = found
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            report["stages"] += 1
        left = [path.name for path in checkpoints.directory.iterdir()]
        assert left == [f"step-{value if fresh else 1:08d}"], left

    checkpoints = Checkpoints(directory / "random")
    write(checkpoints, 1, 1)
    dice = random.Random(0)
    value = 1
    for _ in range(8):
        child = os.fork()
        if child == 0:
            while True:
                value += 1
                write(checkpoints, value, value)
        time.sleep(dice.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = check(checkpoints)
        assert found >= value
        value = found
        report["random"] += 1
    report["last"] = value
    return report


def limit(directory: Path) -> dict[str, object]:
    """A limit on file size makes the kernel refuse the write half way, as a full disk does."""
    checkpoints = Checkpoints(directory / "c")
    write(checkpoints, 1, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    error = ""
    try:
        write(checkpoints, 2, 2)
    except RunError as caught:
        error = str(caught)
    files = sorted(path.name for path in checkpoints.directory.iterdir())
    return {"error": error, "value": check(checkpoints), "files": files}


if __name__ == "__main__":
    result = {"kill": kill, "limit": limit}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(result))
