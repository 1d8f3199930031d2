"""The files of a run: what is in a run directory, and which run it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, final

import yaml
from torch import Tensor

from sparing.core.errors import RequestError
from sparing.core.state import (
    Checkpoints,
    atomic_save,
    atomic_write_json,
    atomic_write_text,
)
from sparing.run.recipe import Recipe, difference, resolve


@final
class RunDirectory:
    """recipe.yaml, metrics.jsonl, summary.json, page.json, report.html, checkpoint/, model/.

    documents.safetensors, the metric of each held-out document by domain, where the task has
    documents; diverged.json where training left the finite numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoint")
        self._metrics: IO[str] | None = None

    @property
    def finished(self) -> bool:
        """Whether a run came to its end here."""
        return (self.path / "summary.json").is_file()

    def recipe(self) -> Recipe | None:
        """The resolved recipe of the run that is here, None if there is none."""
        file = self.path / "recipe.yaml"
        if not file.is_file():
            return None
        try:
            body = yaml.safe_load(file.read_text(encoding="utf-8"))
            return resolve(body)
        except (yaml.YAMLError, RequestError) as error:
            raise RequestError(f"{file} is not a recipe of this version: {error}") from None

    def claim(self, recipe: Recipe, *, resume: bool) -> Recipe:
        """Check that a run of ``recipe`` may go here, and return the recipe that will run.

        Nothing is written yet. A run to resume keeps what it had measured and recorded. Raises
        RequestError if the directory holds another recipe, a finished run, an unfinished one
        without ``resume``, or none at all with it.
        """
        held = self.recipe()
        if held is None:
            if self.path.exists() and not self.path.is_dir():
                raise RequestError(f"{self.path} is not a directory; choose another by --out")
            if self.path.is_dir() and any(self.path.iterdir()):
                raise RequestError(
                    f"{self.path} is not empty and holds no run; choose another directory by --out"
                )
            if resume:
                raise RequestError(f"there is no run to resume in {self.path}; leave --resume out")
            return recipe
        found = difference(_comparable(held, recipe), recipe)
        if found:
            raise RequestError(
                f"{self.path} holds another recipe: {found}; choose another directory by --out"
            )
        if self.finished:
            raise RequestError(
                f"{self.path} holds a finished run; look at it with: sparing report {self.path}, "
                "or choose another directory by --out"
            )
        if not resume:
            raise RequestError(
                f"{self.path} holds an unfinished run of this recipe; go on with it by --resume, "
                "or choose another directory by --out"
            )
        return held

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.yaml."""
        atomic_write_text(self.path / "recipe.yaml", recipe.to_yaml())

    def rewind(self, step: int, steps: int) -> None:
        """Open metrics.jsonl to append, without the lines that a run from ``step`` on will write.

        These are the lines of later steps, and the evaluation after the last of ``steps``.
        """
        file = self.path / "metrics.jsonl"
        kept = [
            line
            for line in _lines(file)
            if line["step"] <= step and (line["step"] < steps or line.get("kind") != "eval")
        ]
        atomic_write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = file.open("a", encoding="utf-8")

    def log(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        assert self._metrics is not None
        self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def write_json(self, name: str, value: Any) -> None:
        """Write one of the JSON files."""
        atomic_write_json(self.path / name, value)

    def write_documents(self, scores: Mapping[str, Tensor]) -> None:
        """Write the metric of each held-out document, by domain."""
        atomic_save(self.path / "documents.safetensors", scores)


def free_path(base: Path) -> Path:
    """``base``, or the first of base-2, base-3, ... that does not exist."""
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def unfinished_path(base: Path) -> Path:
    """The newest of ``base``, base-2, base-3, ... that holds no finished run, to go on with.

    The newest of them if all are finished, ``base`` if there is none.
    """
    found = [base]
    while (following := base.with_name(f"{base.name}-{len(found) + 1}")).exists():
        found.append(following)
    left = [path for path in found if not RunDirectory(path).finished]
    return (left or found)[-1]


def _comparable(held: Recipe, asked: Recipe) -> Recipe:
    """The held recipe with ``auto`` where the asked one leaves the precision to a measurement."""
    body = held.to_dict()
    if asked.train.precision == "auto":
        body["train"]["precision"] = "auto"
    return resolve(body)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be cut short
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line
