"""Runs the tiny recipe and dies; test_runner starts it, because a kill needs a process.

Arguments: for each run its directory, ``step`` or ``save``, and at which one it dies. Imports take
most of the time, so that all runs are forks of one process.
"""

from __future__ import annotations

import os
import signal
import sys

from tiny import tiny

from sparing.core import state
from sparing.run.progress import Quiet
from sparing.run.runner import run


class Deadly(Quiet):
    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, step: int, values: dict[str, str]) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(number: int) -> None:
    """From now on, the ``number``-th checkpoint is left half written."""
    left = number
    save_file = state.save_file

    def deadly(tensors, path):
        nonlocal left
        left -= 1
        if left == 0:
            path.write_bytes(b"\x10" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)

    state.save_file = deadly


def live(out: str, how: str, number: int) -> None:
    if how == "save":
        die_while_saving(number)
    run(tiny(), out, display=Deadly(number if how == "step" else -1))


if __name__ == "__main__":
    recipe = tiny()
    recipe.build_task().model(0)  # imports what every run needs
    for out, how, number in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        child = os.fork()
        if child == 0:
            live(out, how, int(number))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(out, os.waitstatus_to_exitcode(status))
