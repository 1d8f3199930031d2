from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.tasks.language.dataset import (
    Windows,
    held_out_windows,
    passages,
    window_starts,
)


def _text(size: int, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(0, 256, (size,), generator=generator).tolist())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(12, 300), min_size=1, max_size=4),
    length=st.integers(2, 11),
    data=st.data(),
)
def test_batches_equal_naive_slices(sizes: list[int], length: int, data: st.DataObject) -> None:
    texts = {f"d{i}": _text(size, i) for i, size in enumerate(sizes)}
    windows = Windows(texts, length)
    expected = [
        (domain, text[start : start + length + 1])
        for domain, text in enumerate(texts.values())
        for start in range(0, len(text) - length, length)
    ]
    assert len(windows) == len(expected) == sum(windows.counts)
    chosen = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=9))
    index = torch.tensor(chosen)
    batch = windows.batch(index)
    assert windows.domain_of(index).tolist() == [expected[i][0] for i in chosen]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [list(expected[i][1][:-1]) for i in chosen]
    assert batch["labels"].tolist() == [list(expected[i][1][1:]) for i in chosen]


@settings(deadline=None)
@given(size=st.integers(0, 200), length=st.integers(1, 20))
def test_every_byte_but_the_first_is_predicted_at_most_once(size: int, length: int) -> None:
    labels = [
        start + step
        for start in window_starts(size, length).tolist()
        for step in range(1, length + 1)
    ]
    assert labels == list(range(1, len(labels) + 1))
    # What is left at the end is less than one window.
    left = size - 1 - len(labels) if size else 0
    assert 0 <= left < length


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
)
def test_order_is_balanced_and_passes_through_every_window(counts: list[int], seed: int) -> None:
    windows = Windows({f"d{i}": bytes(2 * c + 1) for i, c in enumerate(counts)}, 2)
    assert windows.counts == tuple(counts)
    least = min(counts)
    epochs = 2 * max(counts) // least + 1
    taken: list[list[int]] = [[] for _ in counts]
    for epoch in range(epochs):
        order = windows.order(epoch, seed)
        assert order.shape == (least * len(counts),)
        domains = windows.domain_of(order).view(least, len(counts))
        assert (domains.sort(dim=1).values == torch.arange(len(counts))).all()
        for domain, row in enumerate(taken):
            row.extend(order[windows.domain_of(order) == domain].tolist())
    first = 0
    for count, row in zip(counts, taken, strict=True):
        own = set(range(first, first + count))
        # A pass over the whole domain ends inside an epoch, which is shuffled as a whole, so
        # passes are told apart by how often each window came: never twice before all came once.
        for end in range(least, len(row) + 1, least):
            times = [row[:end].count(window) for window in own]
            assert max(times) - min(times) <= 1
        assert set(row) == own
        first += count


def test_order_depends_on_epoch_and_seed_alone() -> None:
    windows = Windows({"a": _text(999, 0), "b": _text(4000, 1)}, 8)
    later = windows.order(5, 3)
    torch.rand(7)
    assert torch.equal(later, windows.order(5, 3))
    assert not torch.equal(later, windows.order(5, 4))
    assert not torch.equal(later, windows.order(4, 3))
    assert not torch.equal(later, later.sort().values)


def test_empty_and_short_domains_are_refused() -> None:
    with pytest.raises(RequestError, match='domain "b" has no training text: it is empty'):
        Windows({"a": b"abcdefgh", "b": b""}, 4)
    with pytest.raises(RequestError, match=r'seq_len 4 .*"b" has 4 bytes .* at most 3'):
        Windows({"a": b"abcdefgh", "b": b"abcd"}, 4)
    with pytest.raises(RequestError, match='domain "b" has no held-out text'):
        held_out_windows("b", b"", 4, 2)
    assert len(Windows({"b": b"abcde"}, 4)) == 1


def test_held_out_windows_are_spread_over_the_text() -> None:
    text = _text(1001, 3)
    starts, windows = held_out_windows("d", text, 10, 7)
    assert starts.tolist() == [10 * (i * 100 // 7) for i in range(7)]
    for start, window in zip(starts.tolist(), windows.tolist(), strict=True):
        assert bytes(window) == text[start : start + 11]
    few, _ = held_out_windows("d", text, 400, 7)
    assert few.tolist() == [0, 400]


def test_passages_begin_at_a_paragraph_and_fit() -> None:
    assert passages([b"short"], 20) == [b"short"]
    around = b"x" * 55 + b"\n\n" + b"y" * 60
    assert passages([around], 20) == [b"y" * 20]
    assert passages([b"z" * 100], 20) == [b"z" * 20]
