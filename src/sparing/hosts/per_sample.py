"""Losses per sample of Hugging Face models, from their logits and the batch's labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional

from sparing.core.errors import RequestError

Losses = Callable[[nn.Module, Any], tuple[Tensor, Any]]
IGNORED = -100  # the label that marks tokens without a loss, in all Hugging Face models

_HOW = (
    "pass losses=f with f(model, batch) -> (losses of shape (B,), outputs) to attach, or "
    'losses="scalar" to give every sample the mean loss of its micro-batch'
)


@final
class FromLogits:
    """``losses="auto"``: cross-entropy, or squared error where labels are floats.

    Of a causal or masked language model, a token classifier or a sequence-to-sequence model: the
    mean over a sequence's labelled tokens. The mean over a batch is then one over sequences,
    where the models' own loss is one over tokens: the same if all have equally many.

    ``unwrap`` gives the model without the wrappers of DDP; ``smoothing`` is label smoothing.
    """

    def __init__(self, unwrap: Callable[[nn.Module], nn.Module], smoothing: float = 0.0) -> None:
        self.unwrap, self.smoothing = unwrap, smoothing

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """Losses (B,) and outputs; RequestError if they cannot be told from logits and labels."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise RequestError(f'losses="auto" needs a batch with "labels", got {found}; {_HOW}')
        plain = self.unwrap(model)
        plain = getattr(plain, "get_base_model", lambda: plain)()  # of an adapted model
        config = getattr(plain, "config", None)
        both = bool(getattr(config, "is_encoder_decoder", False))
        # labels make the model compute its own loss too, or, in a decoder, its inputs
        given = {key: value for key, value in batch.items() if both or key != "labels"}
        outputs = model(**given)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, Tensor):
            raise RequestError(
                f"{type(plain).__name__} gives no logits, so its losses per sample are not known "
                f"(a scalar loss does not tell whose it is); {_HOW}"
            )
        losses = self._losses(plain, logits.float(), labels, batch, both)
        if losses is None:
            raise RequestError(
                f'losses="auto" knows no loss of {type(plain).__name__} for logits of shape '
                f"{tuple(logits.shape)} and labels of shape {tuple(labels.shape)}, "
                f"{labels.dtype}; {_HOW}"
            )
        return losses, outputs

    def _losses(
        self, model: nn.Module, logits: Tensor, labels: Tensor, batch: Any, both: bool
    ) -> Tensor | None:
        whole = not labels.is_floating_point()
        if whole and labels.ndim == 1 and logits.ndim == 2 and logits.shape[1] > 1:
            return functional.cross_entropy(
                logits, labels, reduction="none", label_smoothing=self.smoothing
            )
        if not whole and logits.squeeze(-1).shape == labels.squeeze(-1).shape:
            if logits.ndim == 2 and logits.shape[1] > 1 and not _regression(model):
                each = functional.binary_cross_entropy_with_logits(
                    logits, labels.float(), reduction="none"
                )
                return each.mean(1)
            error = (logits.squeeze(-1) - labels.squeeze(-1).float()).square()
            return error.flatten(1).mean(1) if error.ndim > 1 else error
        kind = getattr(model, "loss_type", "none")  # None of a model whose name tells no task
        if not whole or logits.ndim != 3 or logits.shape[:2] != labels.shape or kind == "none":
            return None
        if "shift_labels" in batch:
            labels = batch["shift_labels"]
        elif not both and kind not in ("ForMaskedLM", "ForTokenClassification"):
            # the token at t predicts the one at t + 1
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = functional.cross_entropy(
            logits.transpose(1, 2),
            labels,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.smoothing,
        )
        return each.sum(1) / labels.ne(IGNORED).sum(1).clamp_min(1)


def _regression(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "problem_type", None) == "regression"


def scalar(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """``losses="scalar"``: the model's own loss, (B,) times the same.

    Scores made of it tell batches apart, not samples, and a weight of one sample falls on its
    whole micro-batch. RequestError if the model returns no loss.
    """
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if not isinstance(loss, Tensor):
        raise RequestError(f'losses="scalar" needs a model that returns its loss; {_HOW}')
    size = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    return loss.mean().expand(size), outputs
