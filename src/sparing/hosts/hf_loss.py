"""Who computes the loss in Hugging Face's Trainer: the trainer itself, or one for each sample."""

from __future__ import annotations

from typing import Any, Literal, final

from torch import Tensor, nn

from sparing.core.method import Context, Method, combine, implements
from sparing.hosts import loading
from sparing.hosts.per_sample import FromLogits, Losses, scalar


@final
class TrainerLoss:
    """The loss that is trained on, with what the methods add to it or weigh.

    ``losses`` as for ``sparing.attach``. ``plain`` is the trainer's own ``compute_loss``, which
    stays reachable here once it is taken over.
    """

    def __init__(
        self, trainer: Any, methods: list[Method], losses: Literal["auto", "scalar"] | Losses
    ) -> None:
        self.trainer, self.methods, self.plain = trainer, methods, trainer.compute_loss
        self.own = losses == "auto" and not any(
            implements(m, "loss") and m.loss_stage != "batch" for m in methods
        )
        """Whether the trainer's own loss stays, since no method asks for one of each sample."""
        self._each: Losses = (
            FromLogits(trainer.accelerator.unwrap_model, trainer.args.label_smoothing_factor)
            if losses == "auto"
            else scalar
            if losses == "scalar"
            else losses
        )

    def each(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """Losses (B,) and outputs; of the trainer's own loss, which is one number, B times that."""
        with self.trainer.accelerator.autocast():
            if not self.own:
                return self._each(model, batch)
            loss, outputs = self.plain(model, dict(batch), return_outputs=True)
            return loss.mean().expand(loading.rows(batch)), outputs

    def mean(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, a scalar, as it is looked at beside training."""
        if self.own:
            loss: Tensor = self.plain(model, dict(batch))
            return loss.mean()
        return self._each(model, batch)[0].float().mean()

    def trained(
        self, model: nn.Module, batch: dict[str, Any], context: Context, items: Any
    ) -> tuple[Tensor, Any]:
        """The loss to train a micro-batch on, a scalar, and outputs.

        ``items``: tokens of the whole accumulation, if the trainer counts them.
        """
        if not self.own:
            losses, outputs = self._each(model, batch)
            self.trainer.loss_is_scaled_for_ga = False  # a mean: the trainer divides it
            return combine(self.methods, losses, context, outputs), outputs
        loss, outputs = self.plain(model, dict(batch), True, num_items_in_batch=items)
        adding = [m for m in self.methods if implements(m, "loss")]
        if adding:
            # a loss over the tokens of the whole accumulation is its share of the mean
            parts = self._parts(items)
            loss = loss.mean() * parts
            for method in adding:
                loss = method.loss(loss, context, outputs)
            loss = loss / parts
        return loss, outputs

    def _parts(self, items: Any) -> int:
        trainer = self.trainer
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            scaled = trainer.compute_loss_func is not None or (
                trainer.model_accepts_loss_kwargs and items is not None
            )
        return int(trainer.current_gradient_accumulation_steps) if scaled else 1
