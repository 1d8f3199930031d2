"""The experts' tensors of one block, made from the dense ones when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparing.convert.skeleton import Skeleton
from sparing.convert.split import Split, pick
from sparing.experts.families import Block

STRIDE = 1_000_003


@final
@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided for one block.

    split: its hidden units dealt out; scale: folded into the routed experts' last projection;
    gate: (E, d) float32, the router's rows, or None for the router's own; bias: (E, d) float32,
    added to the routed experts' outputs before they are weighed, or None. down: (E, d, u) float32,
    last projections that were fitted, scale included, in the place of the dense ones, and always:
    (d, s), those of the units that are always on; or None.
    """

    split: Split
    scale: float = 1.0
    gate: Tensor | None = None
    bias: Tensor | None = None
    down: Tensor | None = None
    always: Tensor | None = None


@final
class Pieces:
    """Reads dense parts of one block at a time and cuts them; keeps the last one read.

    models: where expert e is a whole block of the e-th of several models, these.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        noise: float = 0.0,
        seed: int = 0,
        models: Sequence[Skeleton] = (),
    ) -> None:
        self.skeleton, self.noise, self.seed, self.models = skeleton, noise, seed, tuple(models)
        self._last: tuple[str, str, int, Tensor] | None = None

    def dense(self, block: Block, part: str, expert: int = 0) -> Tensor:
        """One dense part that ``expert`` is cut from, not to be changed."""
        model = expert if self.models else 0
        if self._last is None or self._last[:3] != (block.path, part, model):
            skeleton = self.models[model] if self.models else self.skeleton
            self._last = (block.path, part, model, skeleton.read(block, part))
        return self._last[3]

    def expert(self, block: Block, part: str, decision: Decision, expert: int) -> Tensor:
        """One routed expert's part, in the dense type."""
        return self._cut(block, part, decision, decision.split.index[expert], expert)

    def routed(self, block: Block, part: str, decision: Decision) -> Tensor:
        """All routed experts' part, (E, ...)."""
        count = decision.split.index.shape[0]
        return torch.stack([self.expert(block, part, decision, e) for e in range(count)])

    def shared(self, block: Block, part: str, decision: Decision, factor: float = 1.0) -> Tensor:
        """The part of the units that are always on; factor: on what leaves the block."""
        dense = self.dense(block, part)
        if part == "down_bias":
            # the routed experts carry the block's bias, since their weights sum to 1
            return torch.zeros_like(dense)
        cut = pick(dense, decision.split.shared, int(part == "down"))
        if part == "down" and decision.always is not None:
            cut = decision.always.to(dense.dtype)
        return (cut * factor).contiguous() if part == "down" else cut.contiguous()

    def _cut(
        self, block: Block, part: str, decision: Decision, units: Tensor, expert: int
    ) -> Tensor:
        if part == "up_bias" and part not in self.skeleton.dense_parts(block):
            # biases that only compensation asked for
            dtype = self.skeleton.dtype(block)
            return torch.zeros(len(units), dtype=dtype)
        if part == "down_bias":
            return self._out_bias(block, decision, expert)
        dense = self.dense(block, part, expert)
        if part == "down" and decision.down is not None:
            return decision.down[expert].to(dense.dtype).contiguous()
        cut = pick(dense, units, int(part == "down"))
        if self.noise:
            cut = cut + self._noise(block, part, expert, dense, cut)
        if part == "down" and decision.scale != 1:
            cut = fold(cut, decision.scale)
        return cut.contiguous()

    def _out_bias(self, block: Block, decision: Decision, expert: int) -> Tensor:
        found = torch.zeros(block.dim, dtype=self.skeleton.dtype(block))
        if "down_bias" in self.skeleton.dense_parts(block):
            found = self.dense(block, "down_bias", expert).clone()
        if decision.bias is not None:
            found = (found.double() + decision.bias[expert].double()).to(found.dtype)
        return found

    def _noise(self, block: Block, part: str, expert: int, dense: Tensor, cut: Tensor) -> Tensor:
        position = [b.path for b in self.skeleton.blocks].index(block.path)
        order = self.skeleton.dense_parts(block).index(part)
        seed = ((self.seed * STRIDE + position) * 8 + order) * 4096 + expert
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        spread = float(dense.float().std()) if dense.numel() > 1 else 0.0
        drawn = torch.randn(cut.shape, generator=generator) * (self.noise * spread)
        return drawn.to(cut.dtype)


def fold(down: Tensor, scale: float) -> Tensor:
    """``scale * down``, rounded once to its type; exact where the scale is a power of two."""
    return (down.double() * scale).to(down.dtype)


def unfold(down: Tensor, scale: float) -> Tensor:
    """The inverse of ``fold``: exact where the scale is a power of two, else within a rounding."""
    return (down.double() / scale).to(down.dtype) if scale != 1 else down
