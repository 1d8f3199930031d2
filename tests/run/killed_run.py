"""Runs the tiny recipe and dies at a step; test_runner runs it, because a kill needs a process."""

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


if __name__ == "__main__":
    out, how, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if how == "save":
        die_while_saving(number)
    run(tiny(), out, display=Deadly(number if how == "step" else -1))
