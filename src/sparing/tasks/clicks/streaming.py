"""The AUC of more rows than can be sorted: counts in bins, with a bound of what that loses."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.tasks.clicks.auc import UndefinedError, checked


@final
class StreamingAUC:
    """Counts positives and negatives by bin of the score; ``value`` lies within ``bound`` of exact.

    A score's bin is the first ``bits`` bits of the float32 nearest to it (sign, 8 bits of
    exponent, the first of its digits), so that any range of scores is resolved to the same number
    of digits and no range must be given. Memory: 2^(bits + 4) bytes. Counts of parts of the data
    add up by ``merge``, whatever the parts.

    Raises RequestError for bits outside [10, 24].
    """

    def __init__(self, bits: int = 18) -> None:
        require_whole("bits", bits, 10)
        if bits > 24:
            raise RequestError(f"bits must be at most 24, got {bits}")
        self.bits = bits
        self._counts = torch.zeros(2, 1 << bits, dtype=torch.int64)  # negatives, positives

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Take in rows, (n,) each. Raises RequestError for NaN and labels that are not 0 or 1."""
        scores, labels = checked(scores, labels)
        # -0 and 0 are one score; reading a float's bits as a whole number keeps the order of
        # positive floats and turns that of negative ones round
        raw = (scores.float() + 0.0).view(torch.int32).long()
        ordered = torch.where(raw < 0, -1 - (raw & 0x7FFFFFFF), raw) + (1 << 31)
        bins = ordered >> (32 - self.bits)
        for label in (0, 1):
            chosen = bins[labels == bool(label)]
            self._counts[label] += torch.bincount(chosen, minlength=1 << self.bits)

    def merge(self, other: StreamingAUC) -> None:
        """Take in what another one counted. Raises RequestError for another number of bits."""
        if other.bits != self.bits:
            raise RequestError(f"bins of {other.bits} and {self.bits} bits cannot be added")
        self._counts += other._counts

    def value(self) -> float:
        """The AUC with scores of one bin as ties. Raises UndefinedError without both classes."""
        below, above = self._counts
        earlier = below.cumsum(0) - below
        # in floats: two counts of 10^10 multiply beyond 64 bits
        pairs = (above.double() * (earlier.double() + 0.5 * below.double())).sum()
        return float(pairs) / self._pairs()

    def bound(self) -> float:
        """The most by which ``value`` can differ from the exact AUC of the scores in float32.

        The pairs within a bin count 1/2 each where the exact AUC has 0, 1/2 or 1.
        """
        below, above = self._counts.double()
        return 0.5 * float((above * below).sum()) / self._pairs()

    def _pairs(self) -> float:
        below, above = (float(each.sum()) for each in self._counts)
        if not below or not above:
            raise UndefinedError(
                f"the AUC of {above:.0f} positive and {below:.0f} negative rows is undefined: it "
                "needs some of both"
            )
        return below * above

    def state_dict(self) -> dict[str, Any]:
        """The counts so far, (2, 2^bits) int64: of negatives, of positives."""
        return {"counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        counts = state["counts"]
        if counts.shape != self._counts.shape:
            raise RequestError(f"counts {tuple(counts.shape)} are not of {self.bits} bits")
        self._counts = counts.clone()
