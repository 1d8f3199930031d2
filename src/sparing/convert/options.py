"""What a conversion is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown

METHODS: Final[dict[str, str]] = {
    "random": "hidden units dealt out at random",
    "contiguous": "neighbouring hidden units",
    "kmeans": "balanced k-means on the rows of the first projection",
    "kmeans-cosine": "the same on rows of length 1",
    "coactivation": "hidden units that are large on the same tokens",
    "gradient": "by |h dL/dh| on clusters of texts, each hidden unit once",
    "sharing-inner": "each expert its cluster's best hidden units, which may repeat",
    "sharing-inter": "the units that most clusters want always on, the rest dealt out",
    "groups": "balanced k-means on the keys, which also make the gate (EMoE)",
    "copy": "each expert the whole block, with noise (upcycling)",
}
SCALES: Final = ("published", "unbiased", "unit", "calibrated", "learned")
GATES: Final = ("zero", "random", "centroids", "keys", "distilled")
COMPENSATIONS: Final = ("none", "mean", "fitted")
FORMS: Final = ("auto", "export", "sparing")
CLUSTERS: Final = ("text", "tokens")
WITH_LOSS: Final = frozenset({"gradient", "sharing-inner", "sharing-inter"})
WITH_DATA: Final = WITH_LOSS | {"coactivation"}
OVERLAPPING: Final = frozenset({"sharing-inner", "copy"})


@final
@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Options of dense to sparse conversion.

    experts: into how many a block is cut; active: how many of them a token passes. residual: how
    many of both are always on, as one shared expert; "sharing-inter" takes 1 if not told.
    method: how hidden units are dealt out, a key of METHODS. If the width is no multiple of
    ``experts``, sizes differ by one unit at most, and units of zeros fill all experts to a common
    width that takes a multiple of 16 bytes.
    scale: of the routed experts' sum, whose weights sum to 1: with n routed experts of which k are
    active, "published" n/k (LLaMA-MoE, arXiv 2406.16554), "unbiased" n, of which the expectation
    over random choices is the dense output, "unit" k, "calibrated" by least squares against the
    dense output, "learned" by the model's own loss, or a number. None: "calibrated" where data
    are at hand anyway, else "published"; copies have 1.
    gate: rows of the router: "zero", "random", "centroids" of the layer's inputs by balanced
    k-means, "keys" (each expert's mean first-projection row), or "distilled" (fitted to the dense
    output). None: "distilled" where data are at hand anyway, else "random"; "keys" with "groups".
    compensate: adds what experts that were not chosen give on average: "none", by "mean" outputs,
    or a bias for each expert "fitted" by least squares. It needs expert biases, and so the
    "sparing" form.
    refit: fit the experts' last projections, chosen and weighed as they are, to the dense output by
    ridge regression; with them the biases, where ``compensate`` asks for some.
    clusters: what importance is taken over: "text"s by the model's own states, or the layer's
    "tokens".
    encoder: the directory of a Hugging Face sentence encoder by which texts are clustered instead.
    first_dense, last_dense: so many first and last blocks stay as they are.
    form: "export" is a Mixtral- or Qwen-style model that ``AutoModelForCausalLM`` loads,
    "sparing" one for ``sparing.load``; "auto" is the first where the model allows it.
    router, router_options: any router of ``sparing ls`` for the "sparing" form.
    noise: of copies, in standard deviations of each tensor. seed: of all that is drawn.
    sequences, length: how much text calibration reads. learn_steps: of the learned scale.
    """

    experts: int = 8
    active: int = 2
    residual: int | None = None
    method: str = "random"
    scale: str | float | None = None
    gate: str | None = None
    compensate: Literal["none", "mean", "fitted"] = "none"
    refit: bool = False
    clusters: Literal["text", "tokens"] = "text"
    encoder: str | None = None
    first_dense: int = 0
    last_dense: int = 0
    form: Literal["auto", "export", "sparing"] = "auto"
    router: str = "top-k"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    seed: int = 0
    sequences: int = 64
    length: int = 512
    learn_steps: int = 30

    def __post_init__(self) -> None:
        require_whole("experts", self.experts, 2)
        require_whole("active", self.active, 1)
        _known("method", self.method, METHODS)
        if self.residual is None:
            inter = self.method == "sharing-inter"
            object.__setattr__(self, "residual", 1 if inter else 0)
        for name in ("first_dense", "last_dense", "residual"):
            require_whole(name, getattr(self, name), 0)
        for name in ("sequences", "length", "learn_steps"):
            require_whole(name, getattr(self, name), 1)
        require_whole("seed", self.seed, 0)
        require_number("noise", self.noise, 0.0)
        if self.active > self.experts:
            raise RequestError(
                f"active must be at most experts ({self.experts}), got {self.active}"
            )
        if self.always >= self.active:
            raise RequestError(
                f"residual experts count among the active ones, so residual must be below active "
                f"({self.active}), got {self.always}"
            )
        if self.method == "sharing-inter" and not self.always:
            raise RequestError('"sharing-inter" needs residual experts; give residual=1 or more')
        if isinstance(self.scale, str):
            _known("scale", self.scale, SCALES)
        elif self.scale is not None:
            require_number("scale", self.scale, 1e-6)
        if self.gate is not None:
            _known("gate", self.gate, GATES)
        _known("compensate", self.compensate, COMPENSATIONS)
        _known("clusters", self.clusters, CLUSTERS)
        if self.encoder is not None and (self.clusters != "text" or self.method not in WITH_LOSS):
            raise RequestError(
                'encoder is for clusters="text" of the methods by importance '
                f"({', '.join(sorted(WITH_LOSS))}); leave it out"
            )
        _known("form", self.form, FORMS)
        self._check_copy()
        if self.scale == "learned" and (self.router != "top-k" or self.router_options):
            raise RequestError(
                'scale="learned" follows softmax top-k routing; with another router take '
                '"calibrated"'
            )
        if self.refit and self.scale == "learned":
            raise RequestError(
                'refit finds what a learned scale would scale; take scale="calibrated", or leave '
                "refit out"
            )
        if self.form == "export":
            if self.router != "top-k" or self.router_options:
                raise RequestError(
                    'form="export" routes by softmax top-k as Mixtral does; leave the router out, '
                    'or take form="sparing"'
                )
            if self.compensate != "none":
                raise RequestError(
                    "compensation needs expert biases, which an exported model lacks; take "
                    'form="sparing", or compensate="none"'
                )

    def _check_copy(self) -> None:
        if self.method == "copy":
            if self.always or self.compensate != "none" or self.refit:
                raise RequestError(
                    "copies are whole blocks; residual, compensate and refit are for parts"
                )
            if self.scale not in (None, 1, 1.0):
                raise RequestError(
                    f"weights of copies sum to 1 and need no scale; got scale={self.scale}"
                )
            object.__setattr__(self, "scale", 1.0)
        elif self.noise:
            raise RequestError('noise is for method="copy"; the other methods keep the weights')

    @property
    def always(self) -> int:
        """``residual`` as a number."""
        return self.residual or 0

    @property
    def routed(self) -> int:
        """Experts that a token chooses among."""
        return self.experts - self.always

    @property
    def chosen(self) -> int:
        """Experts that a token chooses."""
        return self.active - self.always

    def resolved_scale(self, data: bool) -> str | float:
        """The scale rule to apply; data: whether texts are read anyway."""
        return self.scale if self.scale is not None else ("calibrated" if data else "published")

    def resolved_gate(self, data: bool) -> str:
        """The gate to apply; data: whether texts are read anyway."""
        if self.gate is not None:
            return self.gate
        if self.method == "groups":
            return "keys"
        return "distilled" if data and self.method != "copy" else "random"

    @property
    def reads(self) -> bool:
        """Whether what was asked for by name has to see the model's activations."""
        return (
            self.method in WITH_DATA
            or self.scale in ("calibrated", "learned")
            or self.gate in ("centroids", "distilled")
            or self.compensate != "none"
            or self.refit
        )

    @property
    def routed_by_one(self) -> bool:
        """Whether a token's only routed expert has weight 1 whatever the gate says.

        The softmax over one chosen expert has no gradient: the model's loss does not train such a
        gate. ``router_options={"normalize": False}`` weighs by the softmax over all experts
        instead, as Switch does (arXiv 2101.03961).
        """
        own = self.router_options.get("normalize", True)
        return self.chosen == 1 and self.router == "top-k" and bool(own)

    @property
    def fits(self) -> bool:
        """Whether gate, scale or biases are fitted to inputs of the blocks where texts are read."""
        return (
            self.resolved_gate(True) in ("centroids", "distilled")
            or plain_scale(self.resolved_scale(True), self) is None
            or self.compensate != "none"
            or self.refit
        )


def plain_scale(rule: str | float, options: Conversion) -> float | None:
    """The scale that a rule names without data, else None."""
    if not isinstance(rule, str):
        return float(rule)
    n, k = options.routed, options.chosen
    return {"published": n / k, "unbiased": float(n), "unit": float(k)}.get(rule)


def _known(kind: str, name: object, choices: Any) -> None:
    if name not in choices:
        raise unknown(kind, str(name), choices)
