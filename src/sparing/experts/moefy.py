"""Puts expert layers where a model's feed-forward blocks stand, in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.experts.always import AlwaysOn
from sparing.experts.experts import Experts
from sparing.experts.families import FAMILIES, Block, Family, feed_forwards, known_families
from sparing.experts.layer import ExpertLayer, expert_layers
from sparing.experts.masks import attend_
from sparing.experts.where import Where, select

if TYPE_CHECKING:
    from sparing.experts.method import RoutedExperts

M = TypeVar("M", bound=nn.Module)
STRIDE = 1_000_003
"""Between the seeds of two layers: far more than the seeds that people try one after another."""


def moefy_(
    model: M,
    method: RoutedExperts,
    *,
    where: Where = None,
    experts: Literal["fresh", "copy"] | None = None,
    width: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> M:
    """Replace feed-forward blocks of ``model`` by expert layers, in place; returns ``model``.

    model: any model built of blocks that ``families`` knows, on any device and of any dtype, which
    the experts take over (routers compute in float32). It must not be sharded yet.
    method: routes and names the number of experts, such as ``TopAny(max_experts=8)``.
    where: which blocks; see ``where.Where``. experts: ``fresh``, drawn as the model's own weights
    are, or each a ``copy`` of the block, so that the output is the dense model's wherever a
    token's weights sum to 1; ``noise`` is then added, in standard deviations of each tensor.
    width: hidden units of each expert. A copy has the block's own; the default of fresh experts is
    that divided by the experts which a token takes on average, shared ones too, to the next
    multiple of 8, so that a token costs about what it did (beside a residual block: that more).
    What is left out is taken from the method's own options.
    seed: of routers, fresh experts and noise; global generators are not touched.

    Raises RequestError, before anything is changed, if the model has no known block, ``where``
    names none or one that is an expert layer already, a block computes something else than its
    parts suggest or has what experts lack (an unknown activation, dropout of hidden units).
    """
    options = method.options
    where = options.where if where is None else where
    experts = options.init if experts is None else experts
    width = options.width if width is None else width
    if experts not in ("fresh", "copy"):
        raise RequestError(f'experts must be "fresh" or "copy", got "{experts}"')
    if noise < 0 or (noise > 0 and experts == "fresh"):
        raise RequestError(f'noise must be at least 0, and needs experts="copy"; got {noise}')
    chosen = _choose(model, where)
    sizes: dict[str, int] = {}
    if experts == "copy" and options.residual and not options.residual_coefficient:
        raise RequestError(
            'copies beside the residual block would double its output; take init="copy", which '
            "weighs the two, residual_coefficient=True, or fresh experts with zero_output=True"
        )
    for block in chosen:
        admit(block, experts, width, options.residual)
        sizes[block.path] = _width(block, method, experts, width)
    return place_(model, method, sizes, experts=experts, noise=noise, seed=seed)


def place_(
    model: M,
    method: RoutedExperts,
    sizes: Mapping[str, int],
    *,
    experts: Literal["fresh", "copy", "empty"],
    noise: float = 0.0,
    seed: int = 0,
    bias: bool = False,
    families: Sequence[Family] = FAMILIES,
) -> M:
    """The surgery alone, on blocks known to be fit; sizes: the experts' width by block name.

    ``empty`` experts hold whatever the memory held: for weights that are loaded afterwards.
    ``bias`` gives experts biases where the block has none. families: the kinds of block to know.
    """
    blocks = {block.path: block for block in feed_forwards(model, families)}
    for position, path in enumerate(_standing(model, blocks)):
        if path not in sizes:
            continue
        block, own = blocks[path], seed * STRIDE + position
        generator = torch.Generator().manual_seed(own)
        weight, options = block.weight, method.options
        nets = _nets(model, block, sizes[path], method.slots, bias)
        if not weight.is_meta:
            if experts == "fresh":
                nets.init_(generator=generator)
                if options.zero_output:
                    _silence_(nets)
            elif experts == "copy":
                _copy_(nets, block.read(), noise, generator)
        always = _always(model, block, method, sizes[path], experts, generator)
        nets.to(weight.device, weight.dtype)
        layer = ExpertLayer(
            method.router(block.dim, own),
            nets,
            name=path,
            dropout=block.dropout,
            always=always,
        )
        layer.to(weight.device)
        if weight.dtype == torch.float64:
            layer.router.to(torch.float64)
            if always is not None:
                always.to(torch.float64)
        block.replace_(layer.train(block.body.training))
    attend_(model, expert_layers(model))
    more: dict[str, Any] = {"bias": True} if bias else {}
    if families[0] is not FAMILIES[0]:
        more["family"] = asdict(families[0])
    _note_(model, method, sizes, seed, more)
    return model


def _nets(model: nn.Module, block: Block, width: int, slots: int, bias: bool = False) -> Experts:
    """Experts of the block's kind, with its dtype, on the CPU; their weights are not filled yet."""
    std = getattr(getattr(model, "config", None), "initializer_range", None)
    activation = block.activation
    with torch.device("meta"):
        nets = Experts(
            block.dim,
            width,
            slots,
            gated=block.kind == "gated",
            bias=bias or bool({"up_bias", "down_bias"} & block.read().keys()),
            activation=activation,
            init_std=std if isinstance(std, float) and std > 0 else None,
        )
    if not block.weight.is_meta:
        nets.to_empty(device="cpu")
        nets.to(block.weight.dtype)
    return nets


def _always(
    model: nn.Module,
    block: Block,
    method: RoutedExperts,
    width: int,
    experts: Literal["fresh", "copy", "empty"],
    generator: torch.Generator,
) -> AlwaysOn | None:
    """The shared experts and the residual block that the method's options ask for."""
    options, shared, residual = method.options, None, None
    filled = experts != "empty" and not block.weight.is_meta
    if options.shared:
        shared = _nets(model, block, options.shared * (options.shared_width or width), 1)
        if filled:
            shared.init_(generator=generator)
            if options.zero_output or experts == "copy":
                # the block begins as it would without them
                _silence_(shared)
    if options.residual:
        residual = _nets(model, block, block.width, 1)
        if filled:
            _copy_(residual, block.read(), 0.0, generator)
    nets = [net for net in (shared, residual) if net is not None]
    for net in nets:
        net.to(block.weight.device)
    if not nets:
        return None
    return AlwaysOn(
        block.dim,
        shared=shared,
        residual=residual,
        learned=options.residual_coefficient,
    )


def _standing(model: nn.Module, blocks: Mapping[str, Block]) -> dict[str, nn.Module]:
    """All feed-forward blocks by name, in order: those that are dense, and those that were."""
    return {
        path: module
        for path, module in model.named_modules()
        if path in blocks or isinstance(module, ExpertLayer)
    }


def _choose(model: nn.Module, where: Where) -> list[Block]:
    blocks = {block.path: block for block in feed_forwards(model)}
    standing = _standing(model, blocks)
    if not standing:
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise RequestError(
            f'no feed-forward block was recognised in this model ("{kind}"); known are those of '
            f"{known_families()}"
        )
    chosen = select(where, standing)
    done = [path for path in chosen if path not in blocks]
    if done:
        raise RequestError(
            f"{', '.join(done)} is an expert layer already; name the other blocks with where=..., "
            f"or start from a dense model"
        )
    return [blocks[path] for path in chosen]


def admit(block: Block, experts: str, width: int | None, residual: bool) -> None:
    """RequestError if experts cannot stand for the block."""
    block.check()
    _ = block.activation  # raises if experts lack it
    if block.inner > 0:
        raise RequestError(
            f'"{block.path}" drops hidden units with probability {block.inner} in training, which '
            f"experts do not; set that dropout to 0 in the model's configuration first"
        )
    if width is not None and width < 1:
        raise RequestError(f"width must be at least 1, got {width}")
    if experts == "copy" and width not in (None, block.width):
        raise RequestError(
            f'a copy of "{block.path}" has its width {block.width}, got width={width}; leave '
            f'width out, or take experts="fresh"'
        )
    if experts == "copy" or residual:
        bias = block.read().get("gate_bias")
        if bias is not None and not bias.is_meta and bool(bias.any()):
            raise RequestError(
                f'the gate of "{block.path}" has a bias, which gated experts lack; take '
                f'experts="fresh"{" without residual" if residual else ""}'
            )


def _width(block: Block, method: RoutedExperts, experts: str, width: int | None) -> int:
    if width is not None or experts == "copy":
        return width or block.width
    options = method.options
    # with null experts a token takes fewer true ones than k
    names = ("target_k",) if getattr(options, "null_experts", 0) else ("target_k", "k", "start_k")
    taken = next(
        (float(value) for name in names if (value := getattr(options, name, None)) is not None),
        method.expected_k,
    )
    hidden, parts = block.width, max(taken, 1.0)
    if options.shared_width is None:
        parts += options.shared
    else:
        hidden -= options.shared * options.shared_width
    return max(1, math.ceil(hidden / parts / 8)) * 8


@torch.no_grad()
def _silence_(nets: Experts) -> None:
    """Make the experts give zero."""
    for name, parameter in nets.slots().items():
        if name.startswith("down"):
            parameter.zero_()


@torch.no_grad()
def _copy_(
    nets: Experts, dense: Mapping[str, Tensor], noise: float, generator: torch.Generator
) -> None:
    for name, parameter in nets.slots().items():
        if name not in dense:
            parameter.zero_()
            continue
        parameter.copy_(dense[name].expand_as(parameter))
        spread = float(dense[name].std()) if noise and dense[name].numel() > 1 else 0.0
        if spread:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.add_((noise * spread * random).to(parameter))


def _note_(
    model: nn.Module,
    method: RoutedExperts,
    sizes: Mapping[str, int],
    seed: int,
    more: Mapping[str, Any],
) -> None:
    """Keep on the model, as plain data, what is needed to do the same surgery again."""
    options: dict[str, Any] = {**method.to_dict(), "where": list(sizes)}
    note = {"method": method.name, "options": options, "seed": seed, "blocks": dict(sizes)}
    note |= more
    before: list[Any] = vars(model).get("sparing", {"surgeries": []})["surgeries"]
    vars(model)["sparing"] = {"surgeries": [*before, note]}
