"""Conversion of a model that is at work: its feed-forward blocks become experts in place.

What is decided and the tensors that are made are those of ``convert``, from the same code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing.convert import activations
from sparing.convert.checkpoint import Whole
from sparing.convert.deciding import from_model, hidden_of, tokens_of, without_data
from sparing.convert.forms import Asked
from sparing.convert.native import Native, method_of
from sparing.convert.options import Conversion
from sparing.convert.pieces import Decision, Pieces
from sparing.convert.planning import chosen_blocks
from sparing.convert.reading import Batch
from sparing.convert.refitting import ridge
from sparing.convert.skeleton import Skeleton, aliases_of
from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.experts.families import FAMILIES, Block, feed_forwards, known_families
from sparing.experts.method import RoutedExperts
from sparing.experts.moefy import admit, place_


def held(model: nn.Module) -> Skeleton:
    """The model as conversion sees a checkpoint; no weights are copied.

    Raises RequestError if it has no feed-forward block that is known, or one for which experts
    cannot stand.
    """
    blocks = feed_forwards(model)
    if not blocks:
        raise RequestError(
            f"no feed-forward block was recognised in this {type(model).__name__}; known are "
            f"those of {known_families()}. Leave the method convert out for a model whose blocks "
            "are experts already"
        )
    for block in blocks:
        block.check()
        admit(block, "copy", None, False)
    empty = emptied(model)
    aliases = aliases_of(model.state_dict(keep_vars=True))
    tensors = {n: t for n, t in model.state_dict().items() if n not in aliases}
    return Skeleton(
        source=Whole(Path(), tensors),
        model=empty,
        config=getattr(model, "config", None),
        blocks=tuple(feed_forwards(empty)),
        names={name: name for name in tensors},
        aliases=aliases,
        families=FAMILIES,
        whole="it is at work",
    )


def emptied(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, tied where the model is; nothing is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def convert_(
    model: nn.Module, options: Conversion, batches: Sequence[Batch], looked: nn.Module | None = None
) -> tuple[RoutedExperts, dict[str, Decision]]:
    """Make experts of the model's blocks, in place; the method that routes, and what was decided.

    batches: what is looked at, none if the options read nothing; looked: what is called with
    them in the place of the model. The model is on the CPU. On several ranks, all have what the
    first one made. Raises RequestError for a model that experts cannot be made of.
    """
    dense = held(model)
    chosen = chosen_blocks(dense, options)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if options.reads:
            every = {block.path: block for block in feed_forwards(model)}
            blocks = [every[block.path] for block in chosen]
            decisions = from_model(dense, looked or model, blocks, batches, options)
        else:
            decisions = without_data(dense, chosen, options)
    finally:
        for module, training in modes:
            module.training = training
    pieces = Pieces(dense, noise=options.noise, seed=options.seed)
    asked = Asked(pieces=pieces, decisions=decisions, options=options)
    ((_, entries),) = Native().files(asked).items()
    method = method_of(options, decisions)
    place_(
        model,
        method,
        {path: decision.split.width for path, decision in decisions.items()},
        experts="empty",
        seed=options.seed,
        bias=options.compensate != "none",
    )
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for entry in entries:
            if any(entry.name.startswith(f"{path}.") for path in decisions):
                state[entry.name].copy_(entry.make())
                ranks.broadcast_([state[entry.name].detach()])
    return method, decisions


def cut_(
    model: nn.Module,
    share: float,
    batches: Sequence[Batch],
    looked: nn.Module | None = None,
    *,
    refit: bool = False,
) -> dict[str, int]:
    """Keep the share of each block's hidden units that matters most, in place; how many, by block.

    What matters is the mean of |h dL/dh| over the batches; ``refit`` fits the last projections of
    those kept to the dense blocks' outputs. Raises RequestError for blocks that
    are not of separate linear layers, and for a configuration without ``intermediate_size``.
    """
    blocks = feed_forwards(model)
    _require_cuttable(model, blocks)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        labels = [torch.zeros(len(next(iter(b.values()))), dtype=torch.int64) for b in batches]
        scores = activations.importance(looked or model, blocks, batches, labels, 1)
        limit = tokens_of(blocks, refit=refit)
        inputs = activations.inputs_of(looked or model, blocks, batches, limit) if refit else []
    finally:
        for module, training in modes:
            module.training = training
    ranks.broadcast_(scores)
    kept: dict[str, int] = {}
    for position, (block, score) in enumerate(zip(blocks, scores, strict=True)):
        count = max(1, round(share * block.width))
        best = score[0].argsort(descending=True, stable=True)[:count].sort().values
        if refit:
            _refit_(block, inputs[position], best)
        for part in (block.gate, block.up):
            if part is not None:
                _take_(part, best, 0)
        _take_(block.down, best, 1)
        kept[block.path] = count
    config: Any = model.config
    config.intermediate_size = next(iter(kept.values()))
    return kept


def _require_cuttable(model: nn.Module, blocks: Sequence[Block]) -> None:
    width = getattr(getattr(model, "config", None), "intermediate_size", None)
    plain = all(
        type(part) is nn.Linear
        for block in blocks
        for part in (block.up, block.down, *([block.gate] if block.gate is not None else []))
    )
    fused = any(block.kind == "gated" and block.gate is None for block in blocks)
    if not blocks or not plain or fused or any(block.width != width for block in blocks):
        raise RequestError(
            'method="cut" is for models whose feed-forward blocks are separate linear layers, as '
            "wide as their configuration's intermediate_size, such as LLaMA's"
        )


@torch.no_grad()
def _refit_(block: Block, x: Tensor, units: Tensor) -> None:
    """Write into the last projection what of these units alone comes nearest to the dense output.

    x: (T, d) inputs of the block.
    """
    parts = block.read()
    hidden, down = hidden_of(block, parts, x), parts["down"].float()
    weight = block.down.weight
    assert isinstance(weight, Tensor)
    fitted = ridge(hidden[:, units], hidden @ down.t(), down[:, units].t()).t()
    found = [fitted.to(weight)]
    ranks.broadcast_(found)
    weight[:, units] = found[0]


@torch.no_grad()
def _take_(part: nn.Module, units: Tensor, dim: int) -> None:
    assert isinstance(part, nn.Linear)
    weight = part.weight
    part.weight = nn.Parameter(weight.index_select(dim, units), weight.requires_grad)
    if dim == 1:
        part.in_features = len(units)
        return
    part.out_features = len(units)
    if part.bias is not None:
        part.bias = nn.Parameter(part.bias[units], part.bias.requires_grad)
