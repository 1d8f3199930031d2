"""A short recovery run; as a script it kills itself after a checkpoint, because a kill needs a
process. Argument: the run's directory."""

from __future__ import annotations

import os
import signal
import sys

from sparing.run.progress import Quiet
from sparing.run.recipe import Recipe, load
from sparing.run.runner import run

SHORT = (
    "task.domains=[shakespeare,gsm8k]",
    "task.seq_len=16",
    "task.windows=32",
    "task.eval_windows=2",
    "task.sample_tokens=4",
    "train.tokens=768",
    "train.batch_size=8",
    "train.threads=1",
    "methods.convert.sequences=8",
    "methods.mix.every=2",
    "methods.mix.probe_samples=2",
    # of 6 steps: checkpoints every 2
    "watch.checkpoint=0.34",
    "watch.evaluate=1",
)


def short(*overrides: str) -> Recipe:
    """The recipe of six steps."""
    return load("language-convert", [*SHORT, *overrides], smoke=True)


class Deadly(Quiet):
    """Dies at step 3."""

    def update(self, step: int, values: dict[str, str]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(short(), sys.argv[1], display=Deadly())
