"""One weight matrix of an adapter, of which only the kept entries exist."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError, RunError


@final
class Factor(nn.Module):
    """A trained matrix (out, in), dense until ``keep_`` chooses the entries that stay.

    ``values`` is the one parameter: (out, in) while dense, (kept,) afterwards, in the order of the
    matrix's rows. What was not kept has no parameter, no gradient and no optimizer state, and is
    exactly zero for ever. ``bits`` (packed, in state dicts) and ``index`` (kept,) int64 (derived
    from it, in none) say where the values stand.
    """

    values: nn.Parameter
    bits: Tensor | None
    index: Tensor | None

    def __init__(self, dense: Tensor) -> None:
        """``dense``: (out, in), what training starts from."""
        super().__init__()
        if dense.ndim != 2 or not dense.is_floating_point():
            raise RequestError(
                f"a factor is a floating point matrix, got {dense.dtype} {tuple(dense.shape)}"
            )
        self.shape = (int(dense.shape[0]), int(dense.shape[1]))
        self.values = nn.Parameter(dense.detach().clone())
        self.register_buffer("bits", None)
        self.register_buffer("index", None, persistent=False)

    @property
    def size(self) -> int:
        """Entries of the whole matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def kept(self) -> int:
        """Entries that are trained."""
        return self.values.numel()

    def matrix(self) -> Tensor:
        """The matrix (out, in), zero where nothing was kept; differentiable in the values."""
        if self.index is None:
            return self.values
        flat = self.values.new_zeros(self.size)
        return flat.scatter(0, self.index, self.values).view(self.shape)

    def forward(self) -> Tensor:
        """The same as ``matrix``."""
        return self.matrix()

    def mask(self) -> Tensor:
        """Which entries exist: (out, in) bool."""
        flat = torch.ones(self.size, dtype=torch.bool, device=self.values.device)
        if self.index is not None:
            flat = torch.zeros_like(flat).index_fill_(0, self.index, True)
        return flat.view(self.shape)

    @torch.no_grad()
    def keep_(self, mask: Tensor) -> None:
        """Keep the entries where ``mask`` (out, in) bool is True; ``values`` stays the same object.

        Raises RequestError for another shape, or for an entry that was dropped before.
        """
        if mask.shape != self.shape or mask.dtype != torch.bool:
            raise RequestError(
                f"a mask for this factor is bool of shape {self.shape}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        mask = mask.to(self.values.device)
        if self.index is not None and bool((mask & ~self.mask()).any()):
            raise RequestError(
                "the mask keeps entries that were dropped before; a dropped entry has no value"
            )
        flat = mask.reshape(-1)
        kept = self.matrix().detach().reshape(-1)[flat]
        self.values.grad = None
        self.values.data = kept
        self._note(flat)

    @torch.no_grad()
    def keep_units_(self, units: Tensor, dim: int) -> None:
        """Shrink to the rows (``dim`` 0) or columns (1) in ``units``: (n,) int64, ascending.

        The result is a smaller dense matrix, which costs less. Raises RequestError once masked.
        """
        if self.index is not None:
            raise RequestError("choose whole units before single entries are dropped")
        self.values.grad = None
        self.values.data = self.values.data.index_select(dim, units.to(self.values.device))
        self.shape = (int(self.values.shape[0]), int(self.values.shape[1]))

    def _note(self, flat: Tensor) -> None:
        """flat: (out * in,) bool."""
        packed = np.packbits(flat.cpu().numpy())
        self.bits = torch.from_numpy(packed).to(self.values.device)
        self.index = flat.nonzero().squeeze(1).to(self.values.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Takes whatever mask was saved: how many entries a matrix keeps is known from it alone."""
        values, bits = state_dict.get(prefix + "values"), state_dict.get(prefix + "bits")
        if isinstance(values, Tensor):
            with torch.no_grad():
                if isinstance(bits, Tensor):
                    self._note(_unpacked(bits, self.size, values.numel()))
                    self.values.data = self.values.new_zeros(values.shape)
                elif values.ndim == 2:
                    self.bits = self.index = None
                    self.shape = (int(values.shape[0]), int(values.shape[1]))
                    if self.values.shape != values.shape:
                        self.values.data = self.values.new_zeros(values.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def extra_repr(self) -> str:
        """The size of the matrix and how much of it exists."""
        return f"{self.shape[0]} x {self.shape[1]}, kept {self.kept} of {self.size}"


def _unpacked(bits: Tensor, size: int, kept: int) -> Tensor:
    """The mask (size,) bool that ``bits`` packs; RunError unless it has ``kept`` entries."""
    if bits.dtype != torch.uint8 or bits.numel() != (size + 7) // 8:
        raise RunError(f"the saved mask of a factor of {size} entries has {bits.numel()} bytes")
    flat = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=size).astype(bool))
    if int(flat.sum()) != kept:
        raise RunError(f"the saved mask keeps {int(flat.sum())} entries, but {kept} were saved")
    return flat
