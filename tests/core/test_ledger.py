from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.core.ledger import ADDITIVE, LEVELS, UNITS, Ledger, human

amounts = st.integers(min_value=0, max_value=10**30)


def test_amounts_add_up_and_dense_defaults_to_spent() -> None:
    ledger = Ledger()
    ledger.add("samples", spent=60, dense=100)
    ledger.add("samples", spent=40)
    assert ledger.to_dict() == {"samples": {"spent": 100, "dense": 140}}
    assert ledger.saved("samples") == 40 / 140


def test_sums_are_exact_where_a_double_is_not() -> None:
    ledger = Ledger()
    ledger.add("flops", spent=2**60)
    for _ in range(3):
        ledger.add("flops", spent=1)
    assert ledger.spent("flops") == 2**60 + 3
    assert float(2**60) + 3 == float(2**60), "the case must be one that a double gets wrong"


def test_a_level_is_replaced_not_added() -> None:
    ledger = Ledger()
    ledger.set_level("active_parameters", spent=7, dense=10)
    ledger.set_level("active_parameters", spent=5, dense=10)
    assert ledger.to_dict() == {"active_parameters": {"spent": 5, "dense": 10}}


def test_nothing_entered_reads_as_nothing() -> None:
    ledger = Ledger()
    assert [ledger.spent(unit) for unit in UNITS] == [0] * len(UNITS)
    assert ledger.saved("flops") == 0.0
    assert ledger.rows() == []
    assert ledger.to_dict() == {}


def test_spending_more_than_dense_is_told() -> None:
    ledger = Ledger()
    ledger.add("flops", spent=150, dense=100)
    ledger.add("labels", spent=3, dense=0)
    assert ledger.saved("flops") == -0.5
    assert ledger.saved("labels") == -math.inf
    assert [str(row) for row in ledger.rows()] == [
        "compute: 150 FLOP of 100 FLOP (50.0% more)",
        "labels asked for: 3 of 0 (dense spends none)",
    ]


@pytest.mark.parametrize("unit", ["flop", "FLOPS", "sample", "watts", ""])
@pytest.mark.parametrize("verb", ["add", "set_level"])
def test_an_unknown_unit_is_refused_with_the_known_ones(unit: str, verb: str) -> None:
    with pytest.raises(RequestError, match="unknown ledger unit") as error:
        getattr(Ledger(), verb)(unit, spent=1)
    assert "active_parameters" in str(error.value)


def test_an_unknown_unit_names_the_nearest() -> None:
    with pytest.raises(RequestError, match='did you mean "flops"'):
        Ledger().saved("flop")


def test_units_are_not_mixed_up_with_levels() -> None:
    for unit in LEVELS:
        with pytest.raises(RequestError, match="set_level"):
            Ledger().add(unit, spent=1)
    for unit in ADDITIVE:
        with pytest.raises(RequestError, match="use add"):
            Ledger().set_level(unit, spent=1)


@pytest.mark.parametrize(
    "bad", [-1, -0.5, 0.5, math.nan, math.inf, -math.inf, True, "3", None, [1], torch.tensor(0.5)]
)
def test_a_bad_amount_is_refused_and_nothing_is_entered(bad: object) -> None:
    ledger = Ledger()
    ledger.add("tokens", spent=5)
    if bad is not None:  # None is a way to say that dense costs the same
        with pytest.raises(RequestError, match=r'"tokens" \(dense\) must be a whole number'):
            ledger.add("tokens", spent=1, dense=bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r'"tokens" \(spent\) must be a whole number'):
        ledger.add("tokens", spent=bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="must be a whole number"):
        ledger.set_level("parameters", spent=bad)  # type: ignore[arg-type]
    assert ledger.to_dict() == {"tokens": {"spent": 5, "dense": 5}}


@pytest.mark.parametrize("three", [3, 3.0, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind_become_ints(three: object) -> None:
    ledger = Ledger()
    ledger.add("samples", spent=three)  # type: ignore[arg-type]
    assert type(ledger.to_dict()["samples"]["spent"]) is int
    assert ledger.spent("samples") == 3


@given(st.lists(st.tuples(st.sampled_from(sorted(ADDITIVE)), amounts, amounts), max_size=20))
def test_merging_ranks_equals_one_ledger(entries: list[tuple[str, int, int]]) -> None:
    whole, ranks = Ledger(), [Ledger(), Ledger(), Ledger()]
    for position, (unit, spent, dense) in enumerate(entries):
        whole.add(unit, spent=spent, dense=dense)
        ranks[position % 3].add(unit, spent=spent, dense=dense)
    total = Ledger()
    for rank in ranks:
        total.merge(rank)
    assert total == whole


def test_merging_keeps_a_level_that_ranks_share() -> None:
    first, second = Ledger(), Ledger()
    first.set_level("parameters", spent=10, dense=30)
    second.set_level("parameters", spent=10, dense=30)
    first.merge(second)
    assert first.to_dict() == {"parameters": {"spent": 10, "dense": 30}}


@given(amounts, amounts)
def test_state_survives_json_and_pickle_exactly(spent: int, dense: int) -> None:
    ledger = Ledger()
    ledger.add("flops", spent=spent, dense=dense)
    ledger.set_level("parameters", spent=spent, dense=dense)
    back = Ledger()
    back.add("bytes", spent=1)
    back.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert back == ledger
    assert pickle.loads(pickle.dumps(ledger)) == ledger


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"joules": {"spent": 1, "dense": 1}}, "unknown ledger unit"),
        ({"flops": {"spent": 1}}, "must have the keys spent and dense"),
        ({"flops": {"spent": -1, "dense": 1}}, "must be a whole number"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(
    state: dict[str, dict[str, int]], why: str
) -> None:
    ledger = Ledger()
    ledger.add("tokens", spent=5)
    with pytest.raises(RequestError, match=why):
        ledger.load_state_dict({"samples": {"spent": 1, "dense": 1}, **state})
    assert ledger.to_dict() == {"tokens": {"spent": 5, "dense": 5}}


def test_rows_come_in_one_order_and_in_human_units() -> None:
    ledger = Ledger()
    ledger.set_level("active_parameters", spent=1_250_000, dense=2_500_000)
    ledger.add("flops", spent=1_234_567_890_123_456, dense=4_560_000_000_000_000)
    ledger.add("samples", spent=999, dense=999)
    assert [str(row) for row in ledger.rows()] == [
        "samples trained on: 999 of 999",
        "compute: 1.23 PFLOP of 4.56 PFLOP (72.9% saved)",
        "active parameters per token: 1.25 M of 2.50 M (50.0% saved)",
    ]
    assert "1.23 PFLOP of 4.56 PFLOP" in repr(ledger)


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (0, "flops", "0 FLOP"),
        (7, "samples", "7"),
        (999, "flops", "999 FLOP"),
        (1000, "bytes", "1.00 kB"),
        (12_000, "bytes", "12.0 kB"),
        (99_949, "tokens", "99.9 k"),
        (999_499, "tokens", "999 k"),
        (999_500, "tokens", "1.00 M"),
        (3_500_000, "tokens", "3.50 M"),
        (1_230_000_000_000_000, "flops", "1.23 PFLOP"),
        (6 * 10**24, "flops", "6.00 YFLOP"),
    ],
)
def test_three_digits_and_a_prefix(amount: int, unit: str, text: str) -> None:
    assert human(amount, unit) == text
