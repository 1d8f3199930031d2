"""How long a run would take on this machine: a few steps and one evaluation, timed."""

from __future__ import annotations

import statistics
import time

import torch

from sparing.run.recipe import Recipe
from sparing.run.runner import rehearsal

WARM_UP = 2
PROBE_SECONDS = 3.0
"""Steps are timed for as long as this, and for three steps at least."""


def seconds(recipe: Recipe) -> dict[str, float]:
    """{"step", "evaluation", "total"} seconds; trains a model that is thrown away.

    Raises:
        RequestError: the recipe is wrong, as ``run`` would.
    """
    threads = torch.get_num_threads()
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    try:
        with rehearsal(recipe) as (task, session):
            steps = session.clock.steps
            times: list[float] = []
            begun = last = time.perf_counter()
            for batch, context in session:
                losses, outputs = session.forward(batch)
                step = session.clock.step
                session.step(losses, context, outputs)
                if session.clock.step == step:
                    continue  # within an accumulation
                now = time.perf_counter()
                times.append(now - last)
                last = now
                if len(times) >= WARM_UP + 3 and now - begun > PROBE_SECONDS:
                    break
            step_seconds = statistics.median(times[WARM_UP:] or times)
            begun = time.perf_counter()
            with session.evaluating() as model:
                task.evaluate(model)
            evaluation = time.perf_counter() - begun
    finally:
        torch.set_num_threads(threads)
    evaluations = max(1, round(1 / recipe.watch.evaluate))
    return {
        "step": step_seconds,
        "evaluation": evaluation,
        "total": (steps or 0) * step_seconds + evaluations * evaluation,
    }
