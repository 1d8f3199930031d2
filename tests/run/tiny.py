"""The flagship's recipe made smaller still: a run of a second, with every seam at work."""

from __future__ import annotations

from sparing.run.recipe import Recipe, load

NAME = "language-dynmoe"
TINY = (
    "task.domains=[shakespeare]",
    "task.seq_len=32",
    "task.eval_windows=2",
    "train.tokens=6144",
    "train.batch_size=4",
    "train.accumulate=2",
    "train.precision=fp32",
    "train.threads=1",
    "methods.dynmoe.adapt.every=4",
    "methods.dynmoe.adapt.warmup=4",
    "methods.dynmoe.adapt.statistics_every=2",
    # of 24 steps: checkpoints every 5, log lines every 3, so that they do not fall together
    "watch.checkpoint=0.2",
    "watch.log=0.125",
    "watch.evaluate=0.25",
)
STEPS = 24


def tiny(*overrides: str) -> Recipe:
    return load(NAME, [*TINY, *overrides], smoke=True)
