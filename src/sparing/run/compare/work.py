"""Runs of a comparison, several at a time, within a budget of minutes, one comparison at a time."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import sparing
from sparing.core.errors import RequestError

_ROOT = Path(sparing.__file__).resolve().parents[1]
PATIENCE = 5.0
"""Seconds in which runs of a comparison that was killed have ended."""


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to make or to finish. ``block``: jobs of one block are worth starting together."""

    name: str
    block: int
    out: Path
    recipe: str
    preset: str | None
    overrides: tuple[str, ...]
    command: str
    threads: int | None = None

    @property
    def log(self) -> Path:
        """Where its progress goes."""
        return self.out.with_name(f"{self.out.name}.log")


class Launch(Protocol):
    """Makes a run, resuming what is there, and returns why it failed, "" if it did not."""

    def __call__(self, job: Job) -> str:
        """Make or finish the run."""
        ...

    def stop(self) -> None:
        """End all runs that are under way."""
        ...


@final
class Processes:
    """Each run in a process of its own, which ends when this process does, even by a kill."""

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._live: set[subprocess.Popen[bytes]] = set()

    def __call__(self, job: Job) -> str:
        """Make or finish the run, and wait for it."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        changed = {"OMP_NUM_THREADS": str(job.threads)} if job.threads else {}
        # the same package as here, also where a relative path led to it
        paths = (str(_ROOT), os.environ.get("PYTHONPATH", ""))
        changed["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sparing.run.compare.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **changed},
                pass_fds=(self._lock,),  # the lock holds until the last run has ended
            )
        self._live.add(process)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            request = {
                "recipe": job.recipe,
                "preset": job.preset,
                "overrides": list(job.overrides),
                "out": str(job.out),
                "resume": clear(job.out),
                "command": job.command,
            }
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it ended at once; what it said is in the log
            answer = process.stdout.read()
            code = process.wait()
        finally:
            self._live.discard(process)
            for stream in (process.stdin, process.stdout):
                if stream is not None and not stream.closed:
                    _close(stream)
        if code == 0:
            return ""
        try:
            return str(json.loads(answer)["error"])
        except (ValueError, KeyError, TypeError):
            return f"its process ended with {code}; see {job.log}"

    def stop(self) -> None:
        """End all runs; each goes on from its checkpoint when the comparison is run again."""
        for process in list(self._live):
            process.terminate()


def _close(stream: Any) -> None:
    try:
        stream.close()
    except BrokenPipeError:
        return


def clear(out: Path) -> bool:
    """Whether a run is there to resume; remains of a file that a kill left half written go."""
    if (out / "recipe.yaml").is_file():
        return True
    if out.is_dir():
        for left in out.glob(".*.writing"):
            left.unlink()
    return False


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the directory for one comparison; yields the lock, for children to inherit.

    Raises:
        RequestError: another comparison, or a run that one started, is at work there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    holder = os.pread(file, 20, 0).decode(errors="replace").strip()
                    raise RequestError(
                        f"another comparison (process {holder}) is at work in {directory}; wait "
                        "for it, or choose another directory by --out"
                    ) from None
            time.sleep(0.1)
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield file
    finally:
        os.close(file)


@final
class Pool:
    """Starts jobs in order while the budget lasts.

    estimate: seconds that a job will take, None if nothing is known. note: told of each start and
    end. ``failed`` {out: why}; ``skipped`` what the budget did not reach.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        jobs: int,
        budget: float | None,
        estimate: Callable[[Job], float | None],
        note: Callable[[str], None],
        done: Callable[[Job], bool],
    ) -> None:
        self.launch, self.jobs, self.estimate, self.note = launch, jobs, estimate, note
        self.done = done
        self.budget = budget
        self.begun = time.monotonic()
        self.failed: dict[Path, str] = {}
        self.skipped: list[Job] = []
        self._guard = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        if self.budget is None:
            return float("inf")
        return self.budget - (time.monotonic() - self.begun)

    def run(self, jobs: Sequence[Job]) -> None:
        """Make all runs that are not done yet."""
        todo = deque(job for job in jobs if not self.done(job))
        self._total, self._ended = len(todo), 0
        self._first = todo[0].block if todo else 0
        self._entered = self._first

        def work() -> None:
            while (job := self._next(todo)) is not None:
                self._one(job)

        with ThreadPoolExecutor(self.jobs) as pool:
            workers = [pool.submit(work) for _ in range(self.jobs)]
            try:
                for worker in workers:
                    worker.result()
            except BaseException:
                todo.clear()
                self.launch.stop()
                raise

    def _next(self, todo: deque[Job]) -> Job | None:
        with self._guard:
            if not todo:
                return None
            if not self._fits(todo):
                self.skipped += todo
                self.note(
                    f"the budget is used up: {len(todo)} run{'s' * (len(todo) != 1)} not started"
                )
                todo.clear()
                return None
            job = todo.popleft()
            self._entered = job.block
            return job

    def _fits(self, todo: deque[Job]) -> bool:
        if self.budget is None:
            return True
        # a block that could not be finished is not begun, but for the first
        here = todo[0].block
        if here in (self._first, self._entered):
            needed = self.estimate(todo[0]) or 0.0
        else:
            needed = sum(self.estimate(job) or 0.0 for job in todo if job.block == here) / self.jobs
        return needed <= self.left

    def _one(self, job: Job) -> None:
        self.note(f"{job.name}: started")
        begun = time.monotonic()
        why = self.launch(job)
        with self._guard:
            self._ended += 1
            if why:
                self.failed[job.out] = why
            self.note(
                f"{job.name}: {why or f'done in {time.monotonic() - begun:.0f} s'} "
                f"({self._ended} of {self._total})"
            )
