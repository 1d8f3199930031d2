"""What can be chosen about growing a training set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.samples.options import SelectionOptions

RULES: Final[Mapping[str, str]] = {
    "expected": "the mean over all orders of arrival of the distance to what is there already",
    "published": "the distance to what was there at arrival, never looked at again",
    "random": "all alike: the control",
}
SAMPLINGS: Final[Mapping[str, str]] = {
    "static": "a part is drawn once, in proportion to gain, and each epoch takes all of it",
    "proportional": "each epoch draws anew in proportion to gain; a sample may come several times",
    "two-phase": "epochs of high gain and of low gain in turn; their lengths follow the gains",
}
ARRIVALS: Final[Mapping[str, str]] = {
    "given": "in the data set's order",
    "shuffled": "in an order by the seed",
    "by class": "one class after the other",
}


@final
@dataclass(frozen=True, kw_only=True)
class GrowthOptions(SelectionOptions):
    """Options of growing a training set.

    keep: share of the samples that is trained on, in (0, 1]; fewer where cleaning leaves fewer.
    rule: what a sample's gain is, "expected", "published" or "random". sampling: how gains are
    used, "static", "proportional" or "two-phase", whose epochs are as long as the gains make them:
    it needs ``keep`` 1. encoder: what
    makes vectors of samples, by name; "pixels" needs nothing. encoder_options: its own, such as
    {side: 96, dim: 256}. k: nearest neighbours in a gain.
    duplicates: cosine distance below which samples are copies of each other, of which one stays;
    0 leaves all. label_issues: whether samples go whose label confident learning doubts. arrival:
    the order in which samples stream in, "given", "shuffled" or "by class".
    """

    keep: float = 0.25
    rule: str = "expected"
    sampling: str = "static"
    encoder: str = "pixels"
    encoder_options: dict[str, Any] = field(default_factory=dict)
    k: int = 4
    duplicates: float = 0.005
    label_issues: bool = True
    arrival: str = "given"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("keep", self.keep, 0, 1)
        if self.keep == 0:
            raise RequestError("keep must be above 0: it is the share that is trained on")
        for value, what, known in (
            (self.rule, "rule of gain", RULES),
            (self.sampling, "sampling by gain", SAMPLINGS),
            (self.arrival, "order of arrival", ARRIVALS),
        ):
            if value not in known:
                raise unknown(what, value, known)
        if self.sampling == "two-phase" and self.keep != 1:
            raise RequestError(
                "two-phase sampling takes each sample with a chance that its gain decides, in turn "
                f"with the opposite, and has no share to keep; got keep {self.keep}: set keep to "
                '1, or sampling to "proportional"'
            )
        require_whole("k", self.k, 1)
        require_number("duplicates", self.duplicates, 0, 2)

    @property
    def cleans(self) -> bool:
        """Whether samples may go whatever their gain."""
        return self.duplicates > 0 or self.label_issues

    @property
    def idle(self) -> bool:
        """Whether every sample comes once an epoch."""
        return self.keep == 1 and self.sampling == "static" and not self.cleans
