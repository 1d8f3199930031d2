"""The options of CowClip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.updates.clip import Threshold, released_bound

CHOICES = {
    "form": ("adaptive", "fixed"),
    "per": ("row", "table"),
    "mode": ("auto", "dense", "rows", "lazy"),
    "gradients": ("keep", "sparse", "dense"),
    "reduce": ("host", "rows"),
}
RULES = ("rowwise-adagrad", "rowwise-adam", "rowwise-adamw", "adamw")
LAZY = ("rowwise-adamw", "rowwise-adagrad")


@final
@dataclass(frozen=True, kw_only=True)
class CowClipOptions:
    """See the card, docs/methods/cowclip.md.

    The clip: ``ratio`` r (inf clips nothing), ``bound`` zeta (a norm), ``form``, ``per``;
    ``published`` takes the bound as the released program does, r^2 * sqrt(d) * bound. ``l2`` is
    lambda of ``lambda * sum(w^2)`` over whole tables, whose gradient 2 * lambda * w is added
    before the clip. ``tables``: patterns of module names; ``linear``: tables of one column too.

    How: ``mode`` reads all rows ("dense") or those that occur ("rows"); "lazy" does so too, and the
    decay of the tables reaches a row when it is next read, exactly; ``gradients`` sets
    ``sparse`` of the tables; ``reduce``: who adds up the tables' gradients over ranks, the "host"
    (DDP) or this method, which sends only "rows" that occur. ``by_frequency``: every how many
    steps to note which rows are clipped by how often their ids came; 0 keeps no such count.

    Tables in the optimizer, None for what it would do anyway: ``table_lr`` (outside of the
    schedule), ``table_decay``, ``table_eps``, ``table_rule`` (of optimizer "rowwise").
    """

    ratio: float = 1.0
    bound: float = 1e-5
    form: str = "adaptive"
    per: str = "row"
    published: bool = False
    l2: float = 0.0
    tables: tuple[str, ...] = ("*",)
    linear: bool = False
    mode: str = "auto"
    gradients: str = "keep"
    reduce: str = "host"
    by_frequency: int = 10
    table_lr: float | None = None
    table_decay: float | None = None
    table_eps: float | None = None
    table_rule: str | None = None

    def __post_init__(self) -> None:
        for name in ("ratio", "bound", "l2"):
            require_number(name, getattr(self, name), 0)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        require_whole("by_frequency", self.by_frequency, 0)
        patterns = (self.tables,) if isinstance(self.tables, str) else tuple(self.tables)
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise RequestError(f"tables must be patterns of module names, got {self.tables!r}")
        object.__setattr__(self, "tables", patterns)
        for name in ("table_lr", "table_decay", "table_eps"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0)
        if self.table_rule is not None and self.table_rule not in RULES:
            raise unknown("table_rule", self.table_rule, RULES)
        if self.l2 and self.gradients == "sparse":
            raise RequestError(
                'l2 has a gradient in every row of a table, and gradients="sparse" has none for '
                'rows that do not occur: keep dense gradients, or use table_rule="rowwise-adamw" '
                "with table_decay, a decay that is decoupled"
            )
        if self.mode == "lazy":
            self._check_lazy()

    def _check_lazy(self) -> None:
        if self.l2:
            raise RequestError(
                'l2 is coupled to the gradient, and mode="lazy" cannot make up later for what it '
                'does to rows that do not occur: use table_decay with table_rule="rowwise-adamw", '
                'or mode="dense"'
            )
        if self.table_rule not in LAZY:
            raise RequestError(
                f'mode="lazy" needs a table_rule that decays rows later, {" or ".join(LAZY)} of '
                f'optimizer "rowwise", got {self.table_rule!r}'
            )

    def threshold(self, dimensions: int) -> Threshold:
        """The threshold for rows of so many values."""
        bound = self.bound
        if self.published:
            bound = released_bound(bound, dimensions, self.ratio)
        return Threshold(ratio=self.ratio, bound=bound, form=self.form, per=self.per)  # type: ignore[arg-type]

    @property
    def group(self) -> dict[str, object]:
        """What the tables' group of the optimizer has of its own."""
        found: dict[str, object] = {}
        if self.table_lr is not None:
            found |= {"lr": self.table_lr, "fixed_lr": self.table_lr}
        if self.table_decay is not None:
            found["weight_decay"] = self.table_decay
        if self.table_eps is not None:
            found["eps"] = self.table_eps
        if self.table_rule is not None:
            found["rule"] = self.table_rule
        if self.mode == "lazy":
            found["lazy"] = True
        return found
