"""Click models on shared storage, from logistic regression to cross networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.tasks.clicks.interactions import CIN, Cross, Deep, MatrixCross, MixedCross, pairs
from sparing.tasks.clicks.tables import Tables


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What a model adds up.

    ``linear`` terms, products of ``pairs``, a ``deep`` network, a ``cin``; with a ``cross``
    network, its end and the deep network's stand beside each other under one linear layer.
    """

    linear: bool = True
    pairs: bool = False
    deep: bool = False
    cin: bool = False
    cross: str = ""


KINDS: Final[dict[str, Kind]] = {
    "lr": Kind(),
    "fm": Kind(pairs=True),
    "wide-deep": Kind(deep=True),
    "deepfm": Kind(pairs=True, deep=True),
    "xdeepfm": Kind(cin=True, deep=True),
    "dcn": Kind(linear=False, deep=True, cross="vectors"),
    "dcnv2": Kind(linear=False, deep=True, cross="matrices"),
    "dcn-mix": Kind(linear=False, deep=True, cross="mixed"),
}
"""Logistic regression; Rendle 2010; Cheng et al. 2016; Guo et al. 2017; Lian et al. 2018; Wang et
al. 2017; Wang et al. 2021, with full matrices and with mixtures of low rank (which is what the
released code of CowClip calls DCNv2)."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a click model; what its kind does not have is ignored.

    ``dim`` of a field's vector, ``std`` that vectors begin with, ``widths`` of the deep network
    and its ``dropout``, ``cross_layers``, ``rank`` and ``experts`` of mixed ones, ``cin_widths``.
    The defaults of deep and cross parts are those of the CowClip experiments.
    """

    dim: int = 10
    std: float = 0.01
    widths: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.0
    cross_layers: int = 3
    rank: int = 32
    experts: int = 4
    cin_widths: tuple[int, ...] = (100, 100)

    def __post_init__(self) -> None:
        for name in ("widths", "cin_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise RequestError(f"{name} must name the width of at least one layer")
            for width in getattr(self, name):
                require_whole(name, width, 1)
        for name in ("dim", "cross_layers", "rank", "experts"):
            require_whole(name, getattr(self, name), 1)
        require_number("std", self.std, 0)
        require_number("dropout", self.dropout, 0, 1)


@final
class ClickModel(nn.Module):
    """Ids of F fields and D numeric features -> the log-odds of a click.

    ``kind``: a key of ``KINDS``; ``sizes``: how many ids each field has; ``numeric``: D. Vectors
    are shared by all parts that read them. Numeric features enter linear terms and what reads
    x0 = [v_1, ..., v_F, numeric]; products of pairs and the CIN are between fields. ``bias``
    begins at ``log_odds``, those of the training rows' rate for example.

    Raises RequestError for a kind that is not known and sizes that do not fit.
    """

    def __init__(
        self,
        kind: str,
        sizes: Sequence[int],
        numeric: int = 0,
        shape: Shape | None = None,
        *,
        sparse: bool = False,
        log_odds: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("model", kind, KINDS)
        require_whole("numeric", numeric, 0)
        shape = shape or Shape()
        self.kind, self.numeric, self.shape = kind, numeric, shape
        parts = self.parts = KINDS[kind]
        with_vectors = parts.pairs or parts.deep or parts.cin or bool(parts.cross)
        self.tables = Tables(
            sizes,
            shape.dim if with_vectors else 0,
            linear=parts.linear,
            std=shape.std,
            sparse=sparse,
        )
        self.bias = nn.Parameter(torch.tensor([float(log_odds)]))
        inputs = len(self.tables.sizes) * shape.dim + numeric
        self.numeric_linear = (
            nn.Linear(numeric, 1, bias=False) if parts.linear and numeric else None
        )
        self.deep = Deep(inputs, shape.widths, shape.dropout) if parts.deep else None
        self.cin = CIN(len(self.tables.sizes), shape.cin_widths) if parts.cin else None
        self.cross: nn.Module | None = None
        if parts.cross == "vectors":
            self.cross = Cross(inputs, shape.cross_layers)
        elif parts.cross == "matrices":
            self.cross = MatrixCross(inputs, shape.cross_layers)
        elif parts.cross == "mixed":
            self.cross = MixedCross(inputs, shape.cross_layers, shape.rank, shape.experts)
        top = inputs if parts.cross else 0
        top += self.deep.width if self.deep is not None else 0
        top += self.cin.width if self.cin is not None else 0
        self.top = nn.Linear(top, 1, bias=False) if top else None

    def forward(self, ids: Tensor, numeric: Tensor | None = None) -> Tensor:
        """``ids`` (B, F) int64 by field, ``numeric`` (B, D) float -> log-odds (B,).

        Raises RequestError for ids or numeric features that do not fit the model.
        """
        if self.numeric and (numeric is None or numeric.shape != (ids.shape[0], self.numeric)):
            got = None if numeric is None else tuple(numeric.shape)
            raise RequestError(f"numeric must be (batch, {self.numeric}), got {got}")
        tables = self.tables
        places = tables.places(ids)
        found = self.bias.expand(ids.shape[0])
        if tables.linear is not None:
            found = found + tables.linear(places).flatten(1).sum(1)
        if self.numeric_linear is not None:
            found = found + self.numeric_linear(numeric).squeeze(1)
        if tables.vectors is None:
            return found
        vectors = tables.vectors(places)  # (B, F, d)
        if self.parts.pairs:
            found = found + pairs(vectors)
        ends: list[Any] = []
        if self.cross is not None or self.deep is not None:
            flat = vectors.flatten(1)
            x0 = torch.cat([flat, numeric.to(flat.dtype)], 1) if self.numeric else flat  # type: ignore[union-attr]
            ends += [self.cross(x0)] if self.cross is not None else []
            ends += [self.deep(x0)] if self.deep is not None else []
        if self.cin is not None:
            ends.append(self.cin(vectors))
        if self.top is not None:
            found = found + self.top(torch.cat(ends, 1)).squeeze(1)
        return found
