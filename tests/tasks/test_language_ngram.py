from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.cache import cache_folder
from sparing.core.errors import RequestError
from sparing.tasks.language import corpus, reference
from sparing.tasks.language.ngram import NGram


def _whole(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(text, np.uint8), np.arange(len(text))


class Plain:
    """Interpolated modified Kneser-Ney, written with dictionaries, straight from the equations."""

    def __init__(self, order: int, text: bytes) -> None:
        self.order = order
        self.counts: list[dict[bytes, int]] = []
        for n in range(1, order + 1):
            if n == order:
                grams = Counter(text[i : i + n] for i in range(len(text) - n + 1))
            else:
                longer = {text[i : i + n + 1] for i in range(len(text) - n)}
                grams = Counter(gram[1:] for gram in longer)
            self.counts.append(dict(grams))
        self.off = [self._discounts(counts) for counts in self.counts]
        self.followers: list[dict[bytes, list[bytes]]] = []
        for counts in self.counts:
            by_context = defaultdict(list)
            for gram in counts:
                by_context[gram[:-1]].append(gram)
            self.followers.append(by_context)

    @staticmethod
    def _discounts(counts: dict[bytes, int]) -> list[float]:
        n = [sum(c == times for c in counts.values()) for times in range(5)]
        if n[1] == 0 or n[2] == 0:
            return [0.0, 0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        off = [0.0]
        for times in (1, 2, 3):
            if times == 3 and n[3] == 0:
                exact = 1.5
            else:
                exact = times - (times + 1) * y * n[times + 1] / n[times]
            off.append(min(max(exact, 0.05), times - 0.05))
        return off

    def chance(self, context: bytes, byte: int, n: int) -> float:
        if n == 0:
            return 1 / 256
        context = context[len(context) - (n - 1) :]
        lower = self.chance(context[1:], byte, n - 1)
        grams = self.followers[n - 1].get(context)
        if not grams:
            return lower
        counts, off = self.counts[n - 1], self.off[n - 1]
        total = sum(counts[gram] for gram in grams)
        taken = sum(off[min(counts[gram], 3)] for gram in grams)
        own = counts.get(context + bytes([byte]), 0)
        return (own - off[min(own, 3)] + taken * lower) / total

    def bits(self, text: bytes, position: int) -> float:
        n = min(self.order, position + 1)
        return -math.log2(self.chance(text[position - n + 1 : position], text[position], n))


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(1, 5),
    train=st.lists(st.sampled_from(list(b"abcd")), min_size=8, max_size=120).map(bytes),
    held_out=st.lists(st.sampled_from(list(b"abcdz")), min_size=1, max_size=30).map(bytes),
)
def test_agrees_with_plain_python(order: int, train: bytes, held_out: bytes) -> None:
    model, plain = NGram(order, [_whole(train)]), Plain(order, train)
    found = model.bits(*_whole(held_out))
    expected = [plain.bits(held_out, i) for i in range(len(held_out))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_known_tiny_case_by_hand() -> None:
    # "aab": bigrams aa, ab once each, so every discount is the fallback 0.5. Unigrams count
    # preceding bytes: a and b one each. P1(b) = (1 - 0.5 + 1 / 256) / 2,
    # P(b | a) = (1 - 0.5 + 1 * P1(b)) / 2; "b" was never followed: P(b | b) = P1(b).
    model = NGram(2, [_whole(b"aab")])
    p1 = (0.5 + 1 / 256) / 2
    found = model.bits(np.frombuffer(b"abb", np.uint8), np.array([1, 2]))
    np.testing.assert_allclose(2.0**-found, [(0.5 + p1) / 2, p1], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_chances_sum_to_one(order: int) -> None:
    model = NGram(order, [_whole(b"the cat sat on the mat, the rat sat on that cat; " * 3)])
    for context in (b"the ", b" sat", b"zzzz", b"t th"):
        rows = np.stack([np.frombuffer(context + bytes([b]), np.uint8) for b in range(256)])
        bits = model.bits(rows.reshape(-1), np.arange(256) * 5 + 4)
        assert math.isclose(float((2.0**-bits).sum()), 1.0, rel_tol=1e-9)


def test_grams_across_gaps_do_not_count() -> None:
    text = np.frombuffer(b"aaaa----bbbb", np.uint8)
    gaps = NGram(2, [(text, np.array([0, 1, 2, 3, 8, 9, 10, 11]))])
    parts = NGram(2, [_whole(b"aaaa"), _whole(b"bbbb")])
    probe = _whole(b"abba-a")
    np.testing.assert_array_equal(gaps.bits(*probe), parts.bits(*probe))
    joined = NGram(2, [_whole(b"aaaabbbb")])
    assert joined.bits(*probe)[1] < gaps.bits(*probe)[1]


def test_wrong_requests() -> None:
    with pytest.raises(RequestError, match="between 1 and 8"):
        NGram(0, [_whole(b"abc")])
    with pytest.raises(RequestError, match="too short for an n-gram model of order 5"):
        NGram(5, [_whole(b"abcd")])


def test_references_on_a_slice_of_the_real_text() -> None:
    whole = corpus.load(["shakespeare", "gsm8k"])
    texts = {
        "shakespeare": corpus.Split(
            train=whole["shakespeare"].train[:150_000],
            held_out=whole["shakespeare"].held_out[:20_000],
        ),
        "gsm8k": corpus.Split(
            train=whole["gsm8k"].train[:300_000], held_out=whole["gsm8k"].held_out[:20_000]
        ),
    }
    starts = {name: np.arange(0, 19_900, 50) for name in texts}
    scores = reference.measure(texts, starts, 50)
    assert set(scores) == {"5-gram", "5-gram per domain", "xz"}
    for row in scores.values():
        assert set(row) == {"shakespeare", "gsm8k", "mean"}
        assert row["mean"] == pytest.approx((row["shakespeare"] + row["gsm8k"]) / 2)
        assert all(1.0 < value < 3.5 for value in row.values())
    # Who is told the domain does better; context from another domain's text cannot help.
    assert scores["5-gram per domain"]["mean"] < scores["5-gram"]["mean"]


def test_learnt_text_is_of_one_size_and_spread() -> None:
    assert reference.learnt_from(1000, 1000).tolist() == list(range(768))
    at = reference.learnt_from(100_000, 1000)
    assert len(at) == 768
    assert at[0] == 0
    assert at[256] == 256 * (390 // 3)
    assert at[-1] > 60_000
    assert reference.learnt_from(50, 20).tolist() == list(range(20))


def test_xz_knows_what_it_has_seen() -> None:
    text = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
    assert reference.xz_bits(text, text) < 0.3
    assert reference.xz_bits(text[:2500], text[2500:]) > 7.9


def _pretend(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def measure(*_: object) -> reference.Scores:
        calls.append(1)
        return {"xz": {"a": 1.5, "mean": 1.5}}

    monkeypatch.setattr(reference, "measure", measure)
    return calls


def _ask(fingerprint: str = "f", length: int = 4) -> reference.Scores:
    texts = {"a": corpus.Split(train=b"abcdefgh", held_out=b"abcdefgh")}
    return reference.references(texts, {"a": np.array([0])}, length, fingerprint)


def test_references_are_cached_by_data_and_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = _pretend(monkeypatch)
    assert _ask() == _ask() == {"xz": {"a": 1.5, "mean": 1.5}}
    assert len(calls) == 1
    _ask("other")
    _ask("f", 5)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"xz": 3}', '{"xz": {"b": 1, "mean": 1}}', "{}"]
)
def test_a_broken_cache_is_measured_again(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = _pretend(monkeypatch)
    _ask()
    (kept,) = cache_folder().iterdir()
    kept.write_text(content, encoding="utf-8")
    assert _ask()["xz"]["mean"] == 1.5
    assert len(calls) == 2
    _ask()
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    calls = _pretend(monkeypatch)
    _ask()
    assert _ask()["xz"]["mean"] == 1.5
    assert len(calls) == 2
