"""Losses with one value for each sample, (B,), which choosing samples needs.

Where a sample has many losses (tokens, pixels, boxes), they are reduced to one: by default their
mean over what is not masked out, so that the mean over a batch is what usual training minimises
where all samples have as many.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.core.errors import RequestError

Reduction = Literal["mean", "sum", "max"]
REDUCTIONS = ("mean", "sum", "max")


def classification(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy: logits (B, C), targets (B,) int64 or (B, C) probabilities -> (B,)."""
    return F.cross_entropy(
        logits.float(), targets, weight, reduction="none", label_smoothing=label_smoothing
    )


def tokens(logits: Tensor, labels: Tensor, *, shift: bool = True, ignore: int = -100) -> Tensor:
    """The loss of each token: logits (B, S, V), labels (B, S) -> (B, S - 1), or (B, S) unshifted.

    With ``shift``, position s predicts label s + 1. Where the label is ``ignore`` the loss is 0;
    ``mask_of(labels)`` tells where.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise RequestError(
            "losses of tokens need logits (B, S, V) and labels (B, S), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels.reshape(-1),
        ignore_index=ignore,
        reduction="none",
    )
    return flat.reshape(labels.shape)


def mask_of(labels: Tensor, *, shift: bool = True, ignore: int = -100) -> Tensor:
    """Where ``tokens`` has a loss: (B, S) -> (B, S - 1) bool, or (B, S) unshifted."""
    return (labels[:, 1:] if shift else labels) != ignore


def sequences(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    ignore: int = -100,
    per_token: bool = False,
) -> Tensor:
    """Language modelling: logits (B, S, V), labels (B, S) -> (B,).

    By default a sequence's loss is the mean over its own tokens, so that each sequence counts
    alike. With ``per_token`` it is the sum over its tokens divided by the batch's mean number of
    tokens, so that each token counts alike and the mean over the batch is the usual loss over all
    tokens; a score by it grows with a sequence's length. A sequence without tokens has loss 0.
    """
    each = tokens(logits, labels, shift=shift, ignore=ignore)
    mask = mask_of(labels, shift=shift, ignore=ignore)
    if not per_token:
        return dense(each, mask)
    return dense(each, mask, reduction="sum") / mask.sum(1).float().mean().clamp(min=1.0)


def regression(
    predictions: Tensor, targets: Tensor, *, kind: str = "squared", delta: float = 1.0
) -> Tensor:
    """(B, ...) and (B, ...) -> (B,): "squared", "absolute" or "huber", the mean of a sample."""
    if predictions.shape != targets.shape:
        raise RequestError(
            f"predictions of shape {tuple(predictions.shape)} and targets of shape "
            f"{tuple(targets.shape)} differ; a mismatch would broadcast and mix samples"
        )
    if kind == "squared":
        each = F.mse_loss(predictions, targets, reduction="none")
    elif kind == "absolute":
        each = F.l1_loss(predictions, targets, reduction="none")
    elif kind == "huber":
        each = F.huber_loss(predictions, targets, reduction="none", delta=delta)
    else:
        raise RequestError(f'kind must be "squared", "absolute" or "huber", got "{kind}"')
    return dense(each)


def contrastive(left: Tensor, right: Tensor, *, temperature: float | Tensor = 0.07) -> Tensor:
    """Two views or modalities of the same B samples, (B, d) each -> (B,), as in CLIP and SimCLR.

    The mean of both directions' cross-entropies over the batch's cosine similarities. A sample's
    loss depends on the rest of its batch, so its score is noisier than elsewhere.
    """
    if left.ndim != 2 or left.shape != right.shape:
        raise RequestError(
            f"contrastive needs two of shape (B, d), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    similar = F.normalize(left.float(), dim=1) @ F.normalize(right.float(), dim=1).T / temperature
    here = torch.arange(left.shape[0], device=left.device)
    there = F.cross_entropy(similar, here, reduction="none")
    back = F.cross_entropy(similar.T, here, reduction="none")
    return (there + back) / 2


def dense(losses: Tensor, mask: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """Reduce (B, ...) losses of pixels, tokens or boxes to (B,), over what the mask leaves.

    ``mask``: bool, broadcastable to the losses from the left: (B, ...). "mean" is over the places
    left, 0 where there are none; "sum"; "max" is 0 there too. Masked losses may be NaN.
    """
    if reduction not in REDUCTIONS:
        raise RequestError(f'reduction must be one of {", ".join(REDUCTIONS)}, got "{reduction}"')
    if losses.ndim == 0:
        raise RequestError('the losses are reduced to one number already; use reduction="none"')
    flat = losses.reshape(losses.shape[0], -1)
    if mask is None:
        if reduction == "max":
            return flat.amax(1)
        return flat.mean(1) if reduction == "mean" else flat.sum(1)
    wide = mask.reshape(*mask.shape, *[1] * (losses.ndim - mask.ndim)).expand(losses.shape)
    here = wide.reshape(flat.shape).bool()
    if reduction == "max":
        top = flat.masked_fill(~here, -torch.inf).amax(1)
        return torch.where(here.any(1), top, torch.zeros_like(top))
    total = flat.masked_fill(~here, 0.0).sum(1)
    return total if reduction == "sum" else total / here.sum(1).clamp(min=1)


def grouped(losses: Tensor, sample: Tensor, batch: int) -> Tensor:
    """Losses of things of which a sample has any number, such as boxes: their mean by sample.

    losses: (M,), ``sample``: (M,) int64, the row 0 to ``batch`` - 1 of each -> (batch,); 0 for a
    row without any.
    """
    if losses.ndim != 1 or sample.shape != losses.shape:
        raise RequestError(
            f"losses and rows must have one shape (M,), got {tuple(losses.shape)} and "
            f"{tuple(sample.shape)}"
        )
    total = losses.new_zeros(batch).index_add(0, sample, losses)
    count = losses.new_zeros(batch).index_add(0, sample, torch.ones_like(losses))
    return total / count.clamp(min=1)
