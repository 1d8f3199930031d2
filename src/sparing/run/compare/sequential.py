"""Comparisons that are looked at more than once, with the error rate split over the looks."""

from __future__ import annotations

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError


def spend(alpha: float, looks: int, look: int) -> float:
    """The error rate at which to test at ``look``, from 1, of ``looks`` planned ones.

    Testing repeatedly at ``alpha`` until a verdict comes gives wrong verdicts more often than
    ``alpha``. Each look gets an equal share (Bonferroni), so over all looks together a wrong
    "equivalent" comes at most with probability ``alpha``, and so does a wrong "different". The
    bound holds for t tests on any number of seeds and for looks at any spacing. Pocock's
    constant (1977, Biometrika 64) spends a little more a look, but rests on normal
    statistics, and the first looks here come after few seeds.

    Raises:
        RequestError: ``look`` is not one of the planned looks, or ``alpha`` no probability.
    """
    require_number("alpha", alpha, 0.0, 1.0)
    require_whole("looks", looks, 1)
    require_whole("look", look, 1)
    if look > looks:
        raise RequestError(
            f"look {look} was not planned: {looks} were, and the error rate is spent; "
            "begin a new comparison with new seeds"
        )
    return alpha / looks
