"""What conversion sees of the dense model at work; vectors are kept, never activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparing.convert.reading import Batch
from sparing.core.errors import RequestError
from sparing.experts.families import Block

SKETCH = 256
"""Numbers that stand for a hidden unit's activations over all tokens."""


@contextmanager
def hooked(blocks: Sequence[Block], seen: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Within, ``seen(position, hidden)`` is told what enters each block's last projection.

    hidden: (T, f). Returning a tensor puts it in the place of ``hidden``.
    """

    def hook(position: int) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            hidden = inputs[0]
            found = seen(position, hidden.reshape(-1, hidden.shape[-1]))
            return None if found is None else (found.view(hidden.shape), *inputs[1:])

        return before

    handles = [b.down.register_forward_pre_hook(hook(i)) for i, b in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_of(
    model: nn.Module, blocks: Sequence[Block], batches: Iterable[Batch], limit: int
) -> list[Tensor]:
    """Up to ``limit`` tokens' inputs of each block, (T, d) float32, spread evenly over batches."""
    batches = list(batches)
    each = max(1, limit // max(1, len(batches)))
    kept: list[list[Tensor]] = [[] for _ in blocks]
    real: list[Tensor | None] = [None]

    def hook(position: int) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            x = x if real[0] is None else x[real[0]]
            step = max(1, len(x) // each)
            kept[position].append(x[step - 1 :: step][:each].float().clone())

        return before

    handles = [
        (block.body).register_forward_pre_hook(hook(position))
        for position, block in enumerate(blocks)
    ]
    try:
        for batch in batches:
            real[0] = real_tokens(batch)
            look(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in kept]


def importance(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Iterable[Batch],
    labels: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    clusters: int,
    *,
    told: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """The mean over a cluster's tokens of |h * dL/dh| for each hidden unit h: (n, f) float64 each.

    labels: the cluster of each sequence of each batch, (B,) int64, or for each block a sequence of
    (B * S,) ones. The loss is the model's own, whose gradient is taken with respect to hidden
    units alone: no parameter gets one, and one batch's activations are held at a time.

    The published code hooks modules by a deprecated hook whose meaning changed with the version of
    torch; here the gradient is asked of the hidden units themselves. All sequences count: the
    published clustering loses one of each full batch.
    """
    sums = [torch.zeros(clusters, b.width, dtype=torch.float64) for b in blocks]
    counts = [torch.zeros(clusters, dtype=torch.float64) for _ in blocks]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    try:
        for number, batch in enumerate(batches):
            held: dict[int, Tensor] = {}

            def seen(position: int, hidden: Tensor, held: dict[int, Tensor] = held) -> Tensor:
                if not hidden.requires_grad:
                    # the first block: nothing before it has a gradient
                    hidden = hidden.detach().requires_grad_(True)
                held[position] = hidden
                return hidden

            with torch.enable_grad(), hooked(blocks, seen):
                loss = loss_of(model, batch)
                order = sorted(held)
                grads = torch.autograd.grad(loss, [held[i] for i in order])
            real = real_tokens(batch)
            for position, gradient in zip(order, grads, strict=True):
                score = (held[position].detach() * gradient).abs().double()
                own = _labels(labels, position, number, len(score))
                if real is not None:
                    own, score = own[real], score[real]
                sums[position].index_add_(0, own, score)
                counts[position] += torch.bincount(own, minlength=clusters)
            told(number + 1)
    finally:
        for parameter, grad in frozen:
            parameter.requires_grad_(grad)
    return [s / c.clamp_min(1)[:, None] for s, c in zip(sums, counts, strict=True)]


@torch.no_grad()
def coactivation(
    model: nn.Module, blocks: Sequence[Block], batches: Iterable[Batch], seed: int
) -> list[Tensor]:
    """A sketch of |h| over tokens for each hidden unit, (f, SKETCH) float64 each.

    Rows are near each other where units are large on the same tokens: |H|^T R with random signs R
    keeps the products of columns of |H| in expectation (Johnson and Lindenstrauss).
    """
    sums = [torch.zeros(block.width, SKETCH, dtype=torch.float64) for block in blocks]
    generator = torch.Generator().manual_seed(seed)
    signs: list[Tensor] = []
    real: list[Tensor | None] = [None]

    def seen(position: int, hidden: Tensor) -> None:
        hidden = hidden if real[0] is None else hidden[real[0]]
        if position == 0 or len(signs[0]) != len(hidden):
            drawn = torch.randint(0, 2, (len(hidden), SKETCH), generator=generator)
            signs[:] = [drawn.float() * 2 - 1]
        sums[position] += (hidden.abs().float().t() @ signs[0]).double()

    with hooked(blocks, seen):
        for batch in batches:
            real[0] = real_tokens(batch)
            look(model, batch)
    return sums


@torch.no_grad()
def text_vectors(model: nn.Module, blocks: Sequence[Block], batches: Iterable[Batch]) -> Tensor:
    """One vector for each sequence: its mean input of the middle block, (N, d) float32."""
    found: list[Tensor] = []
    middle = blocks[len(blocks) // 2]
    real: list[Tensor | None] = [None]

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        weight = torch.ones(x.shape[:2]) if real[0] is None else real[0].view(x.shape[:2]).float()
        total = weight.sum(1, keepdim=True).clamp_min(1)
        found.append((x * weight[..., None]).sum(1) / total)
        raise _Enough

    handle = middle.body.register_forward_pre_hook(before)
    try:
        for batch in batches:
            real[0] = real_tokens(batch)
            with suppress(_Enough):
                look(model, batch)
    finally:
        handle.remove()
    return torch.cat(found)


class _Enough(Exception):
    """Ends a pass whose rest nobody reads."""


def real_tokens(batch: Batch) -> Tensor | None:
    """Which tokens are no padding, (B * S,) bool; None if the batch has no mask of that shape."""
    mask = batch.get("attention_mask")
    return mask.reshape(-1).bool() if mask is not None and mask.ndim == 2 else None


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's loss on a batch with labels; RequestError if it gives none."""
    out = model(**batch)
    loss = getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        raise RequestError(
            f"a {type(model).__name__} gives no loss on these batches; importance needs batches "
            f'with "labels"'
        )
    return loss


def look(model: nn.Module, batch: Batch) -> None:
    """A pass through the model's blocks without its head, whose outputs nobody reads."""
    body: nn.Module = getattr(model, "base_model", model)
    body(**{name: value for name, value in batch.items() if name != "labels"})


def _labels(labels: Any, position: int, number: int, tokens: int) -> Tensor:
    first = labels[0]
    own: Tensor = labels[number] if isinstance(first, Tensor) else labels[position][number]
    return own if len(own) == tokens else own.repeat_interleave(tokens // len(own))
