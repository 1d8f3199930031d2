"""The result, read back from the disk and compared with the dense model it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.convert.checkpoint import Source
from sparing.convert.forms import Form
from sparing.convert.options import OVERLAPPING, Conversion
from sparing.convert.pieces import Decision, Pieces, fold
from sparing.convert.skeleton import Skeleton
from sparing.convert.split import pick
from sparing.core.errors import RunError
from sparing.experts.families import Block

CLOSE = 1e-5
TOKENS = 16


@final
@dataclass(frozen=True, kw_only=True)
class Checked:
    """What reading the result back found.

    once: whether each hidden unit is in exactly one expert, None where the method overlaps.
    parity: the largest difference between the sum of all experts with weight 1, before folding,
    and the dense blocks, over the largest dense output; None where the method overlaps. Last
    projections that were fitted are left out of it: their dense ones are taken.
    untouched: tensors outside of the blocks, all found identical.
    refitted: whether last projections were fitted; the stored ones are those of the fit.
    """

    once: bool | None
    parity: float | None
    untouched: int
    refitted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """In words."""
        said = [f"read back: {self.untouched} tensors outside of the experts are identical"]
        if self.once is None:
            return [*said, "experts overlap, so that all of them do not add up to the dense model"]
        before = ", before their last projections were fitted," if self.refitted else ""
        return [
            *said,
            "each hidden unit is in exactly one expert",
            f"all experts with weight 1{before} give the dense block within {self.parity:.1e} of "
            f"its largest output",
        ]


@torch.no_grad()
def check(
    pieces: Pieces,
    result: Source,
    form: Form,
    decisions: Mapping[str, Decision],
    options: Conversion,
) -> Checked:
    """Compare the written tensors with the dense ones, one block at a time.

    Raises RunError if any of them is not what it must be.
    """
    skeleton, untouched = pieces.skeleton, 0
    shapes = result.shapes()
    own = {n for b in skeleton.blocks if b.path in decisions for n in skeleton.parts(b).values()}
    for name, theirs in skeleton.names.items():
        if name in own:
            continue
        if name not in shapes or not _same(result.read(name), skeleton.source.read(theirs)):
            raise RunError(
                f'"{name}" differs in the result; the disk may be failing: convert again'
            )
        untouched += 1
    if options.method in OVERLAPPING:
        for block in skeleton.blocks:
            if block.path in decisions and not options.noise:
                _compare(pieces, result, form, block, decisions[block.path])
        return Checked(once=None, parity=None, untouched=untouched, refitted=options.refit)
    worst = 0.0
    for block in skeleton.blocks:
        if block.path not in decisions:
            continue
        decision = decisions[block.path]
        if not decision.split.once(block.width):
            raise RunError(
                f'"{block.path}": a hidden unit is missing or doubled after conversion by '
                f"{options.method}; this is a defect of sparing, please report it"
            )
        _compare(pieces, result, form, block, decision)
        worst = max(worst, _parity(skeleton, result, form, block, decision))
    if worst > CLOSE:
        raise RunError(
            f"all experts with weight 1 differ from the dense model by {worst:.1e} of its largest "
            f"output, more than {CLOSE:g}; this is a defect of sparing, please report it"
        )
    return Checked(once=True, parity=worst, untouched=untouched, refitted=options.refit)


def _compare(pieces: Pieces, result: Source, form: Form, block: Block, decision: Decision) -> None:
    """Every number of every expert against the dense one it stands for."""
    for part in ("gate", "up", "down"):
        if part not in pieces.skeleton.dense_parts(block):
            continue
        axis = int(part == "down")
        stored = form.stored(result, block.path, part)
        for expert, (units, held) in enumerate(zip(decision.split.index, stored, strict=True)):
            real = units >= 0
            dense = pieces.dense(block, part, expert)
            expected = dense.index_select(axis, units[real])
            if part == "down" and decision.down is not None:
                expected = decision.down[expert][:, real].to(dense.dtype)
            elif part == "down":
                expected = fold(expected, decision.scale)
            found = held[:, real] if axis else held[real]
            rest = held[:, ~real] if axis else held[~real]
            if not torch.equal(found, expected) or bool(rest.any()):
                raise RunError(
                    f'"{block.path}" was written with a wrong {part}; the disk may be failing: '
                    f"convert again"
                )


def _parity(
    skeleton: Skeleton, result: Source, form: Form, block: Block, decision: Decision
) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, block.dim, generator=generator)
    parts = skeleton.dense_parts(block)
    dense = {part: skeleton.read(block, part).float() for part in parts}
    hidden = _hidden(block, x, dense.get("gate"), dense["up"], dense.get("up_bias"))
    expected = F.linear(hidden, dense["down"])
    total = torch.zeros_like(expected)
    names = [part for part in ("gate", "up", "up_bias", "down") if part in parts]
    stored = {part: form.stored(result, block.path, part) for part in names}
    for e in range(decision.split.index.shape[0]):
        piece = {part: value[e].float() for part, value in stored.items() if part != "down"}
        # before folding: the stored numbers were compared with the folded ones, bit for bit
        down = dense["down"].index_select(1, decision.split.index[e].clamp_min(0))
        down = down * (decision.split.index[e] >= 0)
        inner = _hidden(block, x, piece.get("gate"), piece["up"], piece.get("up_bias"))
        total += F.linear(inner, down)
    if len(decision.split.shared):
        held = {part: form.always(result, block.path, part) for part in names}
        always = {part: value.float() for part, value in held.items() if value is not None}
        inner = _hidden(block, x, always.get("gate"), always["up"], always.get("up_bias"))
        down = always["down"]
        if decision.always is not None:
            down = pick(dense["down"], decision.split.shared, 1)
        total += F.linear(inner, down)
    return float((total - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _hidden(
    block: Block, x: Tensor, gate: Tensor | None, up: Tensor, bias: Tensor | None
) -> Tensor:
    raised = F.linear(x, up, bias)
    return block.act(raised) if gate is None else block.act(F.linear(x, gate)) * raised


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b))
    return torch.equal(*flat)
