"""What conversion at the start of training is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, final

from sparing.convert.options import METHODS, Conversion
from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown

NONE: Final = "none"
CUT: Final = "cut"
OTHER: Final[dict[str, str]] = {
    NONE: "the model stays as it is",
    CUT: "no experts: the most important hidden units alone, as many as are active",
}
TEXTS: Final = ("training", "own")


@final
@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of conversion at the start of training; see ``Conversion`` for what they mean.

    method: beside those of ``Conversion`` "none", which leaves the model as it is, and "cut": a
    dense model of the active width, of the hidden units with the largest mean |h dL/dh|, whose last
    projections ``refit`` fits too.
    text: what calibration reads, where it reads: the "training" data, in the loop's own batches
    and by its loss, or the model's "own" writing, ``sequences`` of ``length`` tokens.
    seed: of all that is drawn; None: that of the run.
    """

    experts: int = 8
    active: int = 2
    method: str = "random"
    residual: int | None = None
    scale: str | float | None = None
    gate: str | None = None
    compensate: Literal["none", "mean", "fitted"] = "none"
    refit: bool = False
    clusters: Literal["text", "tokens"] = "text"
    first_dense: int = 0
    last_dense: int = 0
    router: str = "top-k"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    text: Literal["training", "own"] = "training"
    sequences: int = 64
    length: int = 512
    learn_steps: int = 30
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in OTHER and self.method not in METHODS:
            raise unknown("method", self.method, [*METHODS, *OTHER])
        if self.text not in TEXTS:
            raise unknown("text", self.text, TEXTS)
        if self.seed is not None:
            require_whole("seed", self.seed, 0)
        self.conversion(0)
        if self.method == CUT and (self.first_dense or self.last_dense):
            raise RequestError(
                'method="cut" cuts all blocks alike; leave first_dense, last_dense out'
            )

    @property
    def reads(self) -> bool:
        """Whether the model is looked at."""
        return self.method != NONE and (self.method == CUT or self.conversion(0).reads)

    def conversion(self, seed: int) -> Conversion:
        """The options as ``sparing convert`` takes them; ``seed`` where none is given."""
        own = {f.name for f in fields(Conversion)}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in own}
        if self.method in OTHER:
            given["method"] = "random"
        return Conversion(
            **{**given, "form": "sparing", "seed": seed if self.seed is None else self.seed}
        )
