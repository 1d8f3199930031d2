"""Experts made of several fine-tunes of one base: one expert of each model's block.

Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816): the blocks become experts, everything
else is averaged, and a new router learns who is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from sparing.convert.checkpoint import Source
from sparing.convert.deciding import decide
from sparing.convert.options import Conversion
from sparing.convert.pieces import Pieces
from sparing.convert.planning import check_place, choose_form, chosen_blocks, planned
from sparing.convert.running import Converted, made
from sparing.convert.skeleton import Skeleton, skeleton
from sparing.convert.writing import Told
from sparing.core.errors import RequestError
from sparing.experts.families import Family


@final
class Averaged(Source):
    """The mean of several models' tensors, taken when one is read; rounded once to its type."""

    def __init__(self, models: Sequence[Skeleton]) -> None:
        self.directory = models[0].source.directory
        self._models = models

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._models[0].source.shapes()

    def dtype(self, name: str) -> torch.dtype:
        return self._models[0].source.dtype(name)

    def read(self, name: str) -> Tensor:
        ours = next((n for n, t in self._models[0].names.items() if t == name), None)
        first = self._models[0].source.read(name)
        if ours is None or not first.is_floating_point():
            return first
        total = first.double()
        for model in self._models[1:]:
            total += model.source.read(model.names[ours]).double()
        return (total / len(self._models)).to(first.dtype)

    def files(self) -> list[list[str]]:
        return self._models[0].source.files()


def combine(
    paths: Sequence[str | Path],
    out: str | Path,
    options: Conversion | None = None,
    *,
    family: Family | None = None,
    told: Told | None = None,
) -> Converted:
    """Make a model of which expert e is the feed-forward of the e-th of ``paths``.

    What is no feed-forward (attention, norms, embeddings) is the mean over the models, and so are
    blocks that stay dense. options: as for ``convert`` with method "copy" and as many experts as
    paths; its gate is "random", "zero" or "keys". Weights sum to 1, so that equal models give
    themselves.

    Raises RequestError if there are fewer than two models, they differ in structure, or the
    options ask for something else; and as ``convert`` does.
    """
    if len(paths) < 2:
        raise RequestError(f"one expert is made of each model; give two or more, got {len(paths)}")
    count = len(paths)
    options = options or Conversion(experts=count, active=min(2, count), method="copy")
    if options.method != "copy" or options.noise:
        raise RequestError('experts of several models are whole blocks: method="copy", no noise')
    if options.experts != count:
        raise RequestError(f"{count} models make {count} experts, got experts={options.experts}")
    if options.reads:
        raise RequestError("experts of several models read no text; take gate random, zero or keys")
    models = [skeleton(path, family) for path in paths]
    for path, model in zip(paths[1:], models[1:], strict=True):
        _same_structure(models[0], model, paths[0], path)
    base = dataclasses.replace(models[0], source=Averaged(models))
    wanted = planned(base, options, data=False)
    check_place(Path(out), wanted.bytes)
    chosen = chosen_blocks(base, options)
    form, _ = choose_form(base, options)
    say = told or (lambda stage, done, total: None)
    decisions = decide(base, chosen, options, told=say)
    pieces = Pieces(base, models=models)
    more = {"models": [str(Path(path).name) for path in paths], "made": "several models"}
    return made(Path(out), pieces, form, decisions, options, wanted, say, more)


def _same_structure(
    first: Skeleton, other: Skeleton, first_path: str | Path, path: str | Path
) -> None:
    def told(what: str) -> RequestError:
        return RequestError(
            f"{path} is no fine-tune of the same base as {first_path}: {what}; give models of one "
            f"architecture and size"
        )

    if first.class_name != other.class_name:
        raise told(f"it is a {other.class_name}, not a {first.class_name}")
    if first.names.keys() != other.names.keys():
        odd = sorted(first.names.keys() ^ other.names.keys())
        raise told(f'"{odd[0]}" is in one of them only')
    for name, theirs in first.names.items():
        mine, its = first.source.shapes()[theirs], other.source.shapes()[other.names[name]]
        if mine != its:
            raise told(f'"{name}" has shape {its}, not {mine}')
    if [b.activation for b in first.blocks] != [b.activation for b in other.blocks]:
        raise told("its activation differs")
