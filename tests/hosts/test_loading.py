from __future__ import annotations

from collections import namedtuple
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from toys import Rows, Whole, session

from sparing.core.errors import RequestError
from sparing.core.method import Context, Plan
from sparing.hosts import loading

few_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def plan_of(*index: int) -> Plan:
    return Plan(torch.tensor(index))


class Doubled:
    """Map-style by protocol only."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        row = self.data[index]
        return {**row, "twice": 2 * row["x"]}


@few_workers
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("data", "index", "first"),
    [
        (Rows(), [7, 0, 3, 9, 2], [7, 0, 3, 9, 2]),
        (Subset(Rows(), [8, 6, 4]), [2, 0, 1], [4, 8, 6]),
        (ConcatDataset([Rows(3), Rows(4)]), [6, 2, 3, 0], [3, 2, 0, 0]),
        (Doubled(Subset(Rows(), [5, 1])), [1, 0], [1, 5]),
    ],
    ids=["rows", "subset", "concat", "protocol"],
)
def test_identity_travels_with_the_samples(data, index, first, workers):
    weight = torch.rand(len(index), generator=torch.Generator().manual_seed(0))
    plan = Plan(torch.tensor(index), weight)
    found = list(loading.batches(data, plan, batch_size=2, workers=workers))
    assert len(found) == -(-len(index) // 2)
    assert [int(i) for _, context in found for i in context.index] == index
    assert [int(x) for batch, _ in found for x in batch["x"][:, 0]] == first
    assert torch.cat([context.weight for _, context in found]).equal(weight)
    assert all(context.share.eq(1).all() for _, context in found)


@few_workers
@pytest.mark.parametrize("workers", [0, 2])
def test_a_session_trains_on_any_map_style_data(workers):
    data = ConcatDataset([Subset(Rows(), [0, 1, 2]), Rows(4)])
    whole = session(data=data, workers=workers, epochs=2)
    orders: list[list[int]] = [[], []]
    for batch, context in whole:
        orders[whole.clock.epoch] += context.index[:, 0].tolist()
        losses, outputs = whole.forward(batch)
        whole.step(losses, context, outputs)
    assert [sorted(order) for order in orders] == [list(range(7))] * 2
    assert orders[0] != orders[1]


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(2)


@few_workers
def test_workers_draw_anew_for_each_seed_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    plan = plan_of(*range(8))
    drawn = [
        torch.cat([b for b, _ in loading.batches(Noisy(), plan, batch_size=4, workers=1, seed=s)])
        for s in (0, 0, 1)
    ]
    assert torch.get_rng_state().equal(before)
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_samples_of_any_shape_and_a_collate_of_ones_own():
    data = TensorDataset(torch.arange(5), torch.arange(5) * 10)
    batch, context = next(loading.batches(data, plan_of(3, 1), batch_size=2))
    assert [t.tolist() for t in batch] == [[3, 1], [30, 10]]
    ragged = [torch.arange(n) for n in range(1, 5)]
    batches = loading.batches(
        ragged,
        plan_of(2, 0, 3),
        batch_size=2,
        collate=lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
    )
    assert [tuple(b.shape) for b, _ in batches] == [(2, 3), (1, 4)]
    assert context.index.tolist() == [[3], [1]]


def test_start_skips_without_reading():
    class Counting(Rows):
        read = 0

        def __getitem__(self, index: int) -> Any:
            Counting.read += 1
            return super().__getitem__(index)

    plan = plan_of(*range(10))
    rest = list(loading.batches(Counting(), plan, batch_size=3, start=2))
    assert [c.index[:, 0].tolist() for _, c in rest] == [[6, 7, 8], [9]]
    assert Counting.read == 4


def test_whole_batches_and_pairs():
    plan = Plan(torch.tensor([[0, 1], [5, 2], [3, 3]]), torch.tensor([1.0, 2.0, 3.0]))

    class Pairs:
        def __len__(self) -> int:
            return 6

        def batch(self, index: Tensor) -> Tensor:
            return index.sum(1)

    found = [batch.tolist() for batch, _ in loading.batches(Pairs(), plan, batch_size=2)]
    assert found == [[1, 7], [6]]
    with pytest.raises(RequestError, match="a plan of pairs needs"):
        next(loading.batches(Rows(), plan, batch_size=2))


def test_a_batch_method_of_other_libraries_is_not_ours():
    class Library(Rows):
        """Like a Hugging Face data set, whose ``batch`` makes another data set."""

        def batch(self, batch_size: int, drop_last_batch: bool = False) -> Any:
            raise AssertionError

    assert loading.gives_batches(Whole())
    assert not loading.gives_batches(Rows())
    assert not loading.gives_batches(Library())
    batch, _ = next(loading.batches(Library(), plan_of(4, 2), batch_size=2))
    assert batch["x"][:, 0].tolist() == [4, 2]


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 4))
def test_ranks_share_all_samples_but_a_rest_equally(samples, batch_size, world):
    number = loading.count(samples, batch_size, world)
    taken = []
    for micro in range(number):
        groups = [loading.share(micro, samples, batch_size, rank, world) for rank in range(world)]
        sizes = {group.stop - group.start for group in groups}
        assert len(sizes) == 1
        assert 1 <= sizes.pop() <= batch_size
        assert all(a.stop == b.start for a, b in pairwise(groups))
        taken += [place for group in groups for place in range(samples)[group]]
    assert taken == list(range(samples - samples % world))


Pair = namedtuple("Pair", ["x", "y"])


def test_nested_batches_keep_their_form():
    x = torch.arange(6).reshape(3, 2)
    batch = {"a": [x, (x, "text")], "pair": Pair(x, torch.tensor(1.0)), "n": 3}
    moved = loading.to_device(batch, torch.device("cpu"))
    assert moved["pair"].y == 1.0
    assert moved["a"][1] == (x, "text") or moved["a"][1][1] == "text"
    first = loading.first_rows(batch, 2, 3)
    assert type(first["pair"]) is Pair
    assert first["pair"].x.tolist() == [[0, 1], [2, 3]]
    assert first["a"][0].shape == (2, 2)
    assert first["a"][1][1] == "text"
    assert first["pair"].y.ndim == 0
    assert first["n"] == 3


def test_tokens_of_a_batch():
    index = torch.arange(2)
    ids = {"input_ids": torch.zeros(2, 7)}
    mask = torch.tensor([[True, False], [True, True]])
    assert loading.token_count(ids, Context.of(index)) == 14
    assert loading.token_count(ids, Context.of(index, mask=mask)) == 3
    assert loading.token_count([ids], Context.of(index)) == 2
