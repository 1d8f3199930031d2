"""Growth as a method: the training set is cleaned and valued first, then trained on in part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Setup, Signal
from sparing.core.select import rounded
from sparing.pool.items import REASONS
from sparing.pool.training import growing, page, reading
from sparing.pool.training.grown import Grown
from sparing.pool.training.options import GrowthOptions
from sparing.samples.draw import Random
from sparing.samples.gains import phase, proportional
from sparing.samples.method import SampleSelection
from sparing.samples.scores import ScoreTable
from sparing.samples.selection import Selection, chosen

Marks = NDArray[np.uint64]


@final
class GrowthSelection(SampleSelection):
    """Streams the training set through cleaning and gain, then trains on a part of it.

    Args:
        vectors: (N, d), what an encoder of your own makes of the samples, where there is no host
            to read them by.
        labels: (N,) int64, their classes.
        told: the options, see GrowthOptions, and what every sampler is told, see SampleSelection.
    """

    name: ClassVar[str] = "growth"
    Options = GrowthOptions
    scored: ClassVar[bool] = False
    repeats: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"keep": 1.0, "duplicates": 0.0, "label_issues": False}

    def __init__(
        self, *, vectors: Tensor | None = None, labels: Tensor | None = None, **told: Any
    ) -> None:
        self._grown: Grown | None = None
        self._entered = False
        super().__init__(**told)
        self._given = None if vectors is None else (vectors.detach().float().cpu(), labels)

    @classmethod
    def at_random(
        cls, options: Mapping[str, Any], signals: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]] | None:
        """As many samples, drawn at random from all of them, copies and wrong labels too."""
        if options.get("rule") == "random":
            return None
        if options.get("sampling") == "two-phase":
            return super().at_random(options, signals)  # as many in each epoch
        keep = signals.get("trained_share", options.get("keep", cls.Options().keep))
        plain = {"rule": "random", "duplicates": 0.0, "label_issues": False, "keep": keep}
        return {cls.name: {**options, **plain}}

    @property
    def idle(self) -> bool:
        return bool(self.options.idle)

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        if not self.idle and self._grown is None and self._given is None:
            options = self.options
            found = reading.read(setup, options.encoder, **options.encoder_options)
            self._grow(found.vectors, found.labels, setup.seed, found.marks, found.flops)
        return model

    def _grow(
        self,
        vectors: Tensor,
        labels: Tensor | None,
        seed: int,
        marks: Marks | None = None,
        spent: int = 0,
    ) -> None:
        found = growing.grow(vectors, labels, self.options, marks=marks, seed=seed)
        self._grown = replace(found, flops=found.flops + spent)
        ranks.broadcast_(self._grown.tensors().values())  # whatever data each has seen

    @property
    def grown(self) -> Grown:
        """What growing found. Raises RequestError before there is anything to look at."""
        if self._grown is None:
            if self._given is None:
                raise RequestError(
                    "growth has seen no sample; attach it to a host, or give vectors of all of "
                    "them, as in GrowthSelection(vectors=encoder(samples), labels=labels)"
                )
            if len(self._given[0]) != self.size:
                raise RequestError(
                    f"there are {len(self._given[0])} vectors for {self.size} samples"
                )
            self._grow(*self._given, self._seed)
        assert self._grown is not None
        return self._grown

    # ---- plans -------------------------------------------------------------------------------

    def choose(self, epoch: int, scores: ScoreTable, random: Random) -> Selection:
        grown, options = self.grown, self.options
        if options.sampling == "static":
            return chosen(grown.kept, random)
        clean = grown.clean
        weights = growing.chances(grown.gains[clean], options.rule).astype(np.float32)
        if options.sampling == "two-phase":
            found = phase(epoch, weights, random, strength=1.0, rescale=False)
        else:
            share = max(1, rounded(options.keep, self.size)) / clean.size
            found = proportional(weights, random, strength=1.0, share=share, rescale=False)
        return Selection(clean[found.index].astype(np.int32))

    def bounds(self, epoch: int) -> tuple[int, int]:
        wanted = max(1, rounded(self.options.keep, self.size))
        if self.options.sampling == "two-phase":
            return 1, self.size
        if self.options.sampling == "proportional":
            return wanted, wanted
        if self._grown is None:
            return 1, wanted
        kept = int(self._grown.kept.sum())
        return kept, kept

    # ---- account, state ----------------------------------------------------------------------

    def account(self, ledger: Ledger) -> None:
        super().account(ledger)
        if self._grown is not None and not self._entered:
            self._entered = True
            ledger.add("flops", spent=self._grown.flops, dense=0)

    def signals(self) -> dict[str, Signal]:
        found = super().signals()
        if self._grown is None:
            return found
        grown = self._grown
        counts = np.bincount(grown.reasons, minlength=len(REASONS)).tolist()
        dropped = {
            reason.replace(" ", "_"): int(count)
            for reason, count in zip(REASONS[1:], counts[1:], strict=True)
            if count
        }
        return {
            **found,
            **dropped,
            "clean": int(counts[0]),
            "mean_gain": float(np.nanmean(grown.gains.astype(np.float64))),
            "trained_share": float(grown.kept.sum() / grown.kept.size),
        }

    def page(
        self, model: nn.Module, passages: list[dict[str, Any]], read: Callable[[Any], Any]
    ) -> dict[str, Any]:
        found = super().page(model, passages, read)
        if self._grown is None:
            return found
        static = self.options.sampling == "static"
        trained = self._grown.kept > 0 if static else self.times_kept() > 0
        return page.add(found, self._grown, trained)

    def state_dict(self) -> dict[str, Any]:
        grown = None if self._grown is None else self._grown.state_dict()
        return {**super().state_dict(), "grown": grown, "entered": self._entered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = state.get("grown")
        self._grown = None if kept is None else Grown.of(kept)
        self._entered = bool(state.get("entered"))
        super().load_state_dict(state)
