"""Shared storage: the rows of all categorical fields in one table, and their linear terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError


@final
class Tables(nn.Module):
    """One table of vectors and, with ``linear``, one of single weights for all fields together.

    ``sizes``: how many ids each of F fields has; field f's rows lie from ``offsets[f]`` on. One
    table instead of F makes one lookup, and one pass over ids for whoever counts them. Vectors
    are drawn from N(0, std^2), linear terms begin at 0. ``sparse``: gradients hold touched rows
    only, which needs an optimizer that takes them.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        *,
        linear: bool = True,
        std: float = 0.01,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if not sizes:
            raise RequestError("a click model needs at least one categorical field")
        for number, size in enumerate(sizes):
            require_whole(f"sizes[{number}]", size, 1)
        require_whole("dim", dim, 0)
        if not dim and not linear:
            raise RequestError("tables need vectors (dim), linear terms (linear), or both")
        self.sizes = tuple(sizes)
        self.dim = dim
        counts = torch.tensor(self.sizes)
        self.rows = int(counts.sum())
        self.offsets: Tensor
        self.register_buffer("offsets", counts.cumsum(0) - counts, persistent=False)
        self.limits: Tensor
        self.register_buffer("limits", counts, persistent=False)
        self.vectors = nn.Embedding(self.rows, dim, sparse=sparse) if dim else None
        self.linear = nn.Embedding(self.rows, 1, sparse=sparse) if linear else None
        if self.vectors is not None:
            nn.init.normal_(self.vectors.weight, std=std)
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)

    def places(self, ids: Tensor) -> Tensor:
        """Ids by field, (B, F) int64 -> rows of the tables, (B, F) int64.

        Raises RequestError for another number of fields, and for an id that its field does not
        have: it would silently read another field's row. On an accelerator, and in a compiled
        graph, ids are trusted, since looking at them there would wait for the device.
        """
        if ids.ndim != 2 or ids.shape[1] != len(self.sizes):
            raise RequestError(
                f"ids must be (batch, {len(self.sizes)}), one column a field, got "
                f"{tuple(ids.shape)}"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = (ids < 0) | (ids >= self.limits)
            if wrong.any():
                row, field = (int(x) for x in wrong.nonzero()[0])
                raise RequestError(
                    f"row {row} of the batch has id {int(ids[row, field])} in field {field}, "
                    f"whose ids go from 0 to {self.sizes[field] - 1}; encode the data with the "
                    "vocabulary that the model was built for"
                )
        return ids + self.offsets

    def extra_repr(self) -> str:
        """The fields and rows."""
        return f"fields={len(self.sizes)}, rows={self.rows}, dim={self.dim}"
