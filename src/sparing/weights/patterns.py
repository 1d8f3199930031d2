"""What a mask keeps or drops as a whole: an entry, a unit, a block, or n of every m entries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparing.core.errors import RequestError

PATTERNS = ("entry", "unit", "block:RxC", "N:M")
Units = Mapping[str, tuple[str, int]]
"""Of each tensor by name: the group whose units it shares, and the axis that counts its units."""


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """Scores of choices that are alike, and the tensors that each choice reaches.

    scores: (choices,). A choice is an entry of a tensor, a block of a tensor, or one unit of all
    tensors of a group.
    """

    names: tuple[str, ...]
    scores: Tensor


@final
@dataclass(frozen=True, slots=True)
class Pattern:
    """Parsed: ``kind`` is "entry", "unit", "block" or "n:m"; of the latter two the two numbers."""

    kind: str
    first: int = 1
    second: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "entry", "unit", "block:4x8" (rows x columns) or "2:4". Raises RequestError."""
        if text in ("entry", "unit"):
            return cls(text)
        if found := re.fullmatch(r"block:(\d+)x(\d+)", text):
            rows, columns = int(found[1]), int(found[2])
            if rows and columns:
                return cls("block", rows, columns)
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            kept, of = int(found[1]), int(found[2])
            if 0 < kept <= of:
                return cls("n:m", kept, of)
        raise RequestError(
            f'unknown pattern "{text}"; expected one of {", ".join(PATTERNS)}, such as '
            f'"block:4x4" or "2:4" (2 kept of every 4 along the last axis)'
        )

    def pieces(self, scores: Mapping[str, Tensor], units: Units | None) -> list[Piece]:
        """Scores by choice, in the order of the tensors; a choice's score is its entries' sum.

        Sums are made in float64. Raises RequestError where a shape does not fit the pattern.
        """
        if self.kind == "block":
            return [Piece((name,), self._blocks(name, score)) for name, score in scores.items()]
        if self.kind == "unit":
            return _groups(scores, units)
        return [Piece((name,), score.reshape(-1)) for name, score in scores.items()]

    def spread(
        self, piece: Piece, chosen: Tensor, shapes: Mapping[str, torch.Size], units: Units | None
    ) -> dict[str, Tensor]:
        """Masks of a piece's tensors from its choices: (choices,) bool -> masks by name."""
        if self.kind == "unit":
            masks = {}
            for name in piece.names:
                axis = _unit(name, units)[1] % len(shapes[name])
                view = [1] * len(shapes[name])
                view[axis] = -1
                masks[name] = chosen.reshape(view).expand(shapes[name]).contiguous()
            return masks
        (name,) = piece.names
        shape = shapes[name]
        if self.kind == "block":
            rows, columns = shape[0] // self.first, shape[1] // self.second
            grid = chosen.reshape(rows, 1, columns, 1)
            return {name: grid.expand(rows, self.first, columns, self.second).reshape(shape)}
        return {name: chosen.reshape(shape)}

    def _blocks(self, name: str, score: Tensor) -> Tensor:
        rows, columns = self.first, self.second
        if score.ndim != 2 or score.shape[0] % rows or score.shape[1] % columns:
            raise RequestError(
                f'"{name}" has shape {tuple(score.shape)}, which blocks of {rows} x {columns} do '
                f"not tile; choose sizes that divide it"
            )
        tiled = score.reshape(score.shape[0] // rows, rows, score.shape[1] // columns, columns)
        return tiled.sum(dim=(1, 3), dtype=torch.float64).reshape(-1)

    def n_of_m(self, name: str, score: Tensor) -> Tensor:
        """The mask of the n best of every m along the last axis; ties to the lowest index."""
        if score.ndim == 0 or score.shape[-1] % self.second:
            raise RequestError(
                f'"{name}" has shape {tuple(score.shape)}, whose last axis is not a multiple of '
                f"{self.second}, as {self.first}:{self.second} needs"
            )
        rows = score.reshape(-1, self.second)
        best = rows.argsort(dim=1, descending=True, stable=True)[:, : self.first]
        mask = torch.zeros(rows.shape, dtype=torch.bool, device=score.device)
        return mask.scatter_(1, best, True).reshape(score.shape)


def _unit(name: str, units: Units | None) -> tuple[str, int]:
    if units is None:
        return name, 0
    if name not in units:
        raise RequestError(f'units says nothing of "{name}"; give its group and axis')
    return units[name]


def _groups(scores: Mapping[str, Tensor], units: Units | None) -> list[Piece]:
    groups: dict[str, list[str]] = {}
    sums: dict[str, Tensor] = {}
    for name, score in scores.items():
        group, axis = _unit(name, units)
        if not -score.ndim <= axis < score.ndim:
            raise RequestError(f'"{name}" has shape {tuple(score.shape)}, so no axis {axis}')
        by_unit = score.movedim(axis, 0).reshape(score.shape[axis], -1).sum(1, dtype=torch.float64)
        if group in sums and sums[group].shape != by_unit.shape:
            raise RequestError(
                f'"{name}" has {by_unit.numel()} units on axis {axis}, but "{groups[group][0]}" of '
                f'the same group "{group}" has {sums[group].numel()}'
            )
        sums[group] = sums[group] + by_unit.to(sums[group].device) if group in sums else by_unit
        groups.setdefault(group, []).append(name)
    return [Piece(tuple(names), sums[group]) for group, names in groups.items()]
