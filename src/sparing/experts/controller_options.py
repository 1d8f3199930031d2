"""Options of the adaptive process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError


@final
@dataclass(frozen=True, kw_only=True)
class ControllerOptions:
    """Options of the adaptive process. Times are optimizer steps, or updates where said.

    every: steps between updates; warmup: steps before the first. window: record for decisions only
    this many steps before each update; None is all of them. freeze_after: share of the planned
    steps after which experts no longer come or go.
    published: the released rule, with its defaults for all that follows; None does as the router.
    remove: by ``usefulness``, by zero ``hits``, or ``never``. usefulness: ``loss``, the relative
    change of the probe's loss when the expert is masked, below ``loss_tolerance`` (asked of the
    one expert of a layer that ``output`` finds least useful), or ``output``, the relative squared
    change of the layer's output, below ``output_tolerance``; without a probe it is ``output``.
    patience: updates in a row that must find an expert useless. min_experts: per layer.
    add: on ``unserved`` tokens, where their share before fallback exceeds e^-k by ``margin``, k
    being the router's target (the mean, at least 1, without one); on ``any`` unserved token; or
    ``never``. hysteresis: none is added while masking the least useful expert changes the loss by
    less than so many tolerances. trial: updates for which a layer is left alone with a newcomer;
    for ``patience`` more it must stay without a removal, before another may come. Each removal
    doubles the updates until the next newcomer, up to ``longest_wait``; a newcomer that proved
    itself sets them back.
    newcomer: starts as a ``copy`` of the expert that covers its tokens now, the ``mean`` of all,
    ``fresh``, or with the slot's weights as ``kept``. direction: its row points to the ``worst``
    covered cluster of tokens or the ``mean`` of the unserved. noise: added to copies, in standard
    deviations of the weights. moments: of its slot, ``zero`` or ``kept``.
    share: the load that thresholds steer each expert to: the target k divided by all ``slots``, so
    that missing experts leave tokens unserved, or by the ``active``, so that k stays the same.
    decay: of the running means of experts' outputs, per step. statistics_every: steps per point.
    """

    every: int = 100
    warmup: int = 100
    window: int | None = None
    freeze_after: float = 0.8
    published: bool | None = None
    remove: Literal["usefulness", "hits", "never"] | None = None
    usefulness: Literal["loss", "output"] = "loss"
    loss_tolerance: float = 0.002
    output_tolerance: float = 0.02
    patience: int = 2
    min_experts: int = 1
    add: Literal["unserved", "any", "never"] | None = None
    margin: float = 0.05
    hysteresis: float = 2.0
    trial: int = 2
    longest_wait: int = 16
    newcomer: Literal["copy", "mean", "fresh", "kept"] | None = None
    direction: Literal["worst", "mean"] | None = None
    noise: float = 0.02
    moments: Literal["zero", "kept"] | None = None
    share: Literal["slots", "active"] = "slots"
    decay: float = 0.98
    statistics_every: int = 20

    def __post_init__(self) -> None:
        for name in (
            "every",
            "patience",
            "min_experts",
            "trial",
            "longest_wait",
            "window",
            "statistics_every",
        ):
            value = getattr(self, name)
            if value is not None:
                require_whole(name, value, 1)
        require_whole("warmup", self.warmup, 0)
        for name in ("loss_tolerance", "output_tolerance", "margin", "hysteresis", "noise"):
            require_number(name, getattr(self, name), 0)
        for name in ("freeze_after", "decay"):
            require_number(name, getattr(self, name), 0, 1)
        choices = {
            "remove": ("usefulness", "hits", "never"),
            "usefulness": ("loss", "output"),
            "add": ("unserved", "any", "never"),
            "newcomer": ("copy", "mean", "fresh", "kept"),
            "direction": ("worst", "mean"),
            "moments": ("zero", "kept"),
            "share": ("slots", "active"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise RequestError(f'{name} must be one of {", ".join(known)}, got "{value}"')

    def resolved(self, published: bool) -> dict[str, Any]:
        """The options that depend on the rule, with its defaults filled in."""
        released = self.published if self.published is not None else published
        rule = (
            ("hits", "any", "kept", "mean", "kept")
            if released
            else ("usefulness", "unserved", "copy", "worst", "zero")
        )
        names = ("remove", "add", "newcomer", "direction", "moments")
        filled = {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in zip(names, rule, strict=True)
        }
        return {**asdict(self), **filled, "published": released}
