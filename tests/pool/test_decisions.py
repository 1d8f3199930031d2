"""Decisions: what they would write, how they are taken back, and that examples are spread."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.decisions import Decision, decide
from sparing.pool.items import REASONS


def test_a_decision_is_made_of_kept_items_only_and_can_be_taken_back() -> None:
    ids = np.arange(100, 200)
    reasons = np.zeros(100, np.int64)
    reasons[:10] = REASONS.index("outlier")
    scores = np.linspace(1, 0, 100)
    made = decide(
        "near copy", ids, reasons, scores > 0.5, detail="within 0.05", scores=scores,
        words="similar at {score:.2f}", others=ids[::-1], examples=5,
    )  # fmt: skip
    assert made.ids.tolist() == list(range(110, 150))
    assert set(made.values.tolist()) == {REASONS.index("near copy")}
    assert [example.id for example in made.examples] == [110, 119, 129, 139, 149]
    assert made.examples[0].detail == "similar at 0.90"
    assert made.examples[0].other == 189
    after = reasons.copy()
    after[made.ids - 100] = made.values
    after[20] = REASONS.index("evicted")  # a later decision stands
    back, values = made.undone(after[made.ids - 100])
    after[back - 100] = values
    reasons[20] = REASONS.index("evicted")
    assert (after == reasons).all()


def test_nothing_to_decide_and_unknown_reasons() -> None:
    none = decide(
        "outlier", np.arange(3), np.zeros(3, np.int64), np.zeros(3, bool),
        detail="", scores=np.zeros(3), words="",
    )  # fmt: skip
    assert none.examples == ()
    assert len(none.values) == 0
    with pytest.raises(RequestError, match='did you mean "outlier"'):
        Decision(reason="outlyer", ids=np.arange(1), before=np.arange(1))
    with pytest.raises(RequestError, match="former reason"):
        Decision(reason="outlier", ids=np.arange(1), before=np.arange(2))
