"""What can be chosen about a mixture, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.samples.mixing_weights import CRITERIA, DISTANCES

RULES = {
    "none": "the order is left to others; losses by source are recorded",
    "size": "each sample as often as any other",
    "uniform": "each source as often as any other",
    "static": "as the option weights says",
    "temperature": "size^(1 / temperature)",
    "random": "drawn anew at every tick, the control of what follows",
    "sheared": "by how far losses are above reference losses (arXiv 2310.06694)",
    "reference-loss": "by how far losses are from reference losses (arXiv 2406.11256)",
    "gate-load": "by how sources differ in their load of experts (arXiv 2406.11256)",
}
FORMS = {
    "sheared": ("published", "released", "anchored"),
    "reference-loss": ("anchored", "published"),
    "gate-load": ("anchored", "published"),
}
"""By rule, the default first."""
_ETA = {"gate-load": 10.0, "reference-loss": 1.0, "sheared": 1.0}
_FLOOR = {"gate-load": 0.05, "reference-loss": 1e-4, "random": 0.05}


@final
@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """Options of mixing.

    rule: how weights come about, one of ``RULES``. weights: those of ``static``, and those that
    the last three rules start from and anchored forms stay near: by the sources' names (a missing
    one gets 0) or in their order; None is uniform. temperature: of its rule, and of the start
    where ``weights`` is None and it is given.
    share: samples of an epoch, as a share of all. every: optimizer steps between two ticks, at
    which the last four rules make new weights and what is left of the plan is made anew; None:
    at the end of each epoch only.
    form: "anchored" updates the first weights, so that a constant signal gives constant weights;
    "published" the latest, so that it drives them to the floor; "released" is Sheared-LLaMA's code
    where that departs from its paper. eta, floor: strength of an update and the share that is dealt
    out evenly; None is the publication's. reference: reference losses, for the two rules by loss,
    as ``weights`` is given.
    losses: "training", those of the batches since the last tick; or "probe", of fresh samples in
    evaluation mode, as loads always are: ``probe_samples`` of each source over all ranks.
    distance, criterion, layers: what gate loads are compared by, over which other sources, and in
    the "last" expert layer or, averaged, in "all".
    """

    rule: str = "uniform"
    weights: Mapping[str, float] | Sequence[float] | None = None
    temperature: float | None = None
    share: float = 1.0
    every: int | None = 100
    form: str | None = None
    eta: float | None = None
    floor: float | None = None
    reference: Mapping[str, float] | Sequence[float] | None = None
    losses: str = "training"
    probe_samples: int = 32
    distance: str = "l2"
    criterion: str = "mean"
    layers: str = "last"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown("mixing rule", self.rule, RULES)
        for name in ("weights", "reference"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if self.temperature is not None:
            require_number("temperature", self.temperature, 0)
            if self.temperature == 0:
                raise RequestError("temperature must be above 0")
        if self.rule == "temperature" and self.temperature is None:
            raise RequestError('rule "temperature" needs a temperature, such as 3')
        if self.rule == "static" and self.weights is None:
            raise RequestError('rule "static" needs weights; for even ones take rule "uniform"')
        if self.by_loss and self.reference is None:
            raise RequestError(
                f'rule "{self.rule}" needs reference losses by source: those of a model trained on '
                "uniform weights, or of a larger one, such as reference={'code': 0.26}"
            )
        require_number("share", self.share, 0, 1)
        if self.share == 0:
            raise RequestError("share must be above 0")
        if self.every is not None:
            require_whole("every", self.every, 1)
        forms = FORMS.get(self.rule, ())
        if self.form is not None and self.form not in forms:
            raise unknown(f'form of rule "{self.rule}"', self.form, forms)
        if self.eta is not None:
            require_number("eta", self.eta, 0)
        if self.floor is not None:
            require_number("floor", self.floor, 0, 1)
        if self.losses not in ("training", "probe"):
            raise unknown("way to measure losses", self.losses, ("training", "probe"))
        require_whole("probe_samples", self.probe_samples, 1)
        if self.distance not in DISTANCES:
            raise unknown("distance", self.distance, DISTANCES)
        if self.criterion not in CRITERIA:
            raise unknown("criterion", self.criterion, CRITERIA)
        if self.layers not in ("last", "all"):
            raise unknown("choice of layers", self.layers, ("last", "all"))

    @property
    def by_loss(self) -> bool:
        """Whether the rule reads losses."""
        return self.rule in ("sheared", "reference-loss")

    @property
    def moves(self) -> bool:
        """Whether the rule makes new weights at ticks."""
        return self.rule in (*FORMS, "random")

    @property
    def formed(self) -> str:
        """``form``, or the rule's default."""
        return self.form or FORMS.get(self.rule, ("anchored",))[0]

    @property
    def strength(self) -> float:
        """``eta``, or the publication's."""
        return _ETA.get(self.rule, 1.0) if self.eta is None else self.eta

    @property
    def least(self) -> float:
        """``floor``, or the publication's."""
        if self.floor is not None:
            return self.floor
        if self.rule == "sheared":
            return 1e-4 if self.formed == "released" else 0.0
        return _FLOOR.get(self.rule, 0.0)


def _plain(name: str, given: Any) -> Any:
    """Plain data, as YAML takes it."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        found: Any = {str(key): value for key, value in given.items()}
        values = list(found.values())
    elif isinstance(given, Sequence) and not isinstance(given, str):
        found = values = list(given)
    else:
        raise RequestError(f"{name} must be numbers by source, or in the sources' order: {given!r}")
    for value in values:
        require_number(name, value, 0)
    return found
