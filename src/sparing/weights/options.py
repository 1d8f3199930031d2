"""What a sparse adapter is asked to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.weights.bottleneck import ACTIVATIONS
from sparing.weights.masks import SCOPES, require_share
from sparing.weights.patterns import Pattern
from sparing.weights.places import KINDS

SCORES = (
    "random",
    "magnitude",
    "er",
    "erk",
    "snip",
    "iterative-snip",
    "grasp",
    "synflow",
    "fisher",
)
DATA_FREE = ("random", "magnitude", "er", "erk", "synflow")
"""Scores that look at no labels; SynFlow takes the shapes of a batch, if there is one."""
DTYPES = ("float32", "float64", "bfloat16", "float16")


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``SparseAdapter``.

    kind: "pfeiffer", "houlsby", "parallel", "lora", "prefix" or "mam" (prefix and parallel).
    keep: the share of the adapter's matrix entries that is kept, in (0, 1]; biases all stay.
    score: by what entries are kept; "er" and "erk" are random, with Erdos-Renyi densities.
    scope: the budget is one of all matrices, "global", or of each adapted "layer" or "tensor".
    pattern: "entry", "unit" (whole bottleneck units or ranks, which makes the adapter smaller and
    faster), "block:4x4", "2:4" and the like.
    targets: names, a regular expression or "all-linear"; None is the kind's usual places.
    exclude: names or a regular expression of places to leave out.
    train_also: modules of the base that are trained too; None: a new head of a transformers model
    (``classifier``, ``score``, ``qa_outputs``). Their values belong to the adapter.
    rank, alpha: of LoRA, which is scaled by alpha / rank. width: units of a bottleneck; None is
    the input's size divided by 16, by 2 for parallel ones. length: vectors of a prefix.
    scale: factor on what a bottleneck gives; None is 1, or 4 for parallel ones.
    activation: of bottlenecks; None is "swish" for houlsby, else "relu".
    dropout: on LoRA's input, on a bottleneck's hidden units.
    budget: trained values of the adapter, biases included and ``train_also`` not. Rank, width or
    length are then the largest that this pays for at the share ``keep``: large and sparse.
    zero_start: nothing changes before training. False: as in the published sparse adapters, all
    matrices N(0, 0.02); a prefix then shares the softmax with the tokens.
    dtype: of the adapter; None is float32 where the base is in half precision, else the base's.
    batches: how many batches of the data are scored. iterations: steps of iterative-snip.
    seed: of initial values and random scores; None is that of the run.
    """

    kind: str = "pfeiffer"
    keep: float = 0.6
    score: str = "snip"
    scope: str = "global"
    pattern: str = "entry"
    targets: Any = None
    exclude: Any = None
    train_also: Any = None
    rank: int = 8
    alpha: float = 8.0
    width: int | None = None
    length: int = 30
    scale: float | None = None
    activation: str | None = None
    dropout: float = 0.0
    budget: int | None = None
    zero_start: bool = True
    dtype: str | None = None
    batches: int = 8
    iterations: int = 5
    seed: int | None = None
    name: str = "default"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of adapter", self.kind, KINDS)
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        require_share(self.keep)
        Pattern.parse(self.pattern)
        for field in ("rank", "length", "batches", "iterations"):
            require_whole(field, getattr(self, field), 1)
        for field in ("width", "budget"):
            if getattr(self, field) is not None:
                require_whole(field, getattr(self, field), 1)
        if self.seed is not None:
            require_whole("seed", self.seed, 0)
        require_number("alpha", self.alpha, 0)
        if self.scale is not None:
            require_number("scale", self.scale)
        require_number("dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise RequestError("dropout must be below 1; at 1 nothing passes")
        if self.pattern != "entry" and self.score in ("er", "erk"):
            raise RequestError(f'"{self.score}" counts single entries; use pattern="entry"')
        require_name(self.name)
        for field in ("targets", "exclude", "train_also"):
            value = getattr(self, field)
            if isinstance(value, tuple | set):
                object.__setattr__(self, field, list(value))
            elif value is not None and not isinstance(value, str | list):
                raise RequestError(f"{field} must be names or an expression, got {value!r}")
        if isinstance(self.train_also, str):
            object.__setattr__(self, "train_also", [self.train_also])


def require_name(name: object) -> None:
    """Raise RequestError unless ``name`` can name an adapter, a module and a file."""
    from torch import nn

    fine = isinstance(name, str) and name and not set(name) & set("./\\ ")
    if not fine or hasattr(nn.ModuleDict, str(name)):
        raise RequestError(
            f"an adapter's name is a word without dots, slashes and spaces, and not one of "
            f'torch\'s own such as "train"; got {name!r}'
        )
