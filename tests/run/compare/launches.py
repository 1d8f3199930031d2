"""Ways to make the runs of a comparison in tests: for show, and in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparing.core.state import atomic_write_json, atomic_write_text
from sparing.run.compare.work import Job, clear
from sparing.run.recipe import Recipe, load
from sparing.run.runner import run


class Cut(BaseException):
    """An end that nothing catches."""


def recipe_of(job: Job) -> Recipe:
    return load(job.recipe, job.overrides, preset=job.preset)


class ForShow:
    """Writes what a run would leave: the metric is ``metric(recipe)``, None for a divergence."""

    def __init__(self, metric: Callable[[Recipe], float | None], *, cut_at: int = -1) -> None:
        self.metric = metric
        self.jobs: list[Job] = []
        self.cut_at = cut_at
        self.stopped = False

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.jobs]

    def __call__(self, job: Job) -> str:
        if len(self.jobs) == self.cut_at:
            raise Cut
        self.jobs.append(job)
        recipe = recipe_of(job)
        resumed = clear(job.out)
        job.out.mkdir(parents=True, exist_ok=True)
        assert resumed == (job.out / "recipe.yaml").is_file()
        atomic_write_text(job.out / "recipe.yaml", recipe.alone().to_yaml())
        value = self.metric(recipe)
        if value is None:
            atomic_write_json(job.out / "diverged.json", {"why": "the loss is not finite"})
            return "the loss is not finite"
        atomic_write_json(job.out / "summary.json", summary_of(recipe, value))
        return ""

    def stop(self) -> None:
        self.stopped = True


def summary_of(recipe: Recipe, value: float) -> dict[str, Any]:
    name = next(iter(recipe.methods), None)
    return {
        "format": 1,
        "recipe": recipe.name,
        "task": "language",
        "corpus": f"{recipe.task['split']:c<64}",
        "seed": recipe.seed,
        "metric": {"name": "bits_per_byte", "value": value, "higher_is_better": False},
        "methods": {name: {"mean_k": 1.5 + recipe.seed}} if name else {},
        "ledger": {"flops": {"spent": 1000 + recipe.seed, "dense": 2000}},
        "seconds": 60.0,
        "code": "c0de" * 16,
    }


class InProcess:
    """Really trains, without the seconds that a process of its own takes to begin."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, job: Job) -> str:
        self.names.append(job.name)
        run(recipe_of(job), job.out, resume=clear(job.out), command=job.command, page=False)
        return ""

    def stop(self) -> None: ...


def read(path: Path) -> Any:
    return json.loads(path.read_text())
