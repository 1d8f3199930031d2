"""Traps of what was released before this pool, seen from a pool's user; more are in test_growth."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.cli import grow
from sparing.pool.cleaning import Cleaning
from sparing.pool.growth import Growth
from sparing.pool.items import Item, Vectors


def same(batch: Tensor) -> Tensor:
    return batch


def rows(n: int, seed: int = 0, dim: int = 12) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    made = random.standard_normal((20, dim))[random.integers(0, 20, n)]
    made = made + 0.3 * random.standard_normal((n, dim))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def grown(given: NDArray[np.float32], **options: Any) -> Growth:
    pool = Growth(encoder=same, **options)
    for at in range(0, len(given), 100):
        pool.add(torch.from_numpy(given[at : at + 100]))
    return pool


class Pairs:
    """Both vectors of an item are in its tensor; ``common`` is in all images, and in no text."""

    version = "pairs-1"

    def __init__(self, common: float = 0.0) -> None:
        self.common, self.dim = common, 13

    def __call__(self, items: Any) -> Vectors:
        both = np.stack([item.tensor for item in items])
        extra = np.full((len(both), 1), self.common, np.float32)
        main = np.concatenate([both[:, :12], extra], 1)
        second = np.concatenate([both[:, 12:], 0 * extra], 1)
        lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in (main, second)]
        return Vectors(main=main / lengths[0], second=second / lengths[1])


def pairs(n: int, wrong: NDArray[np.bool_]) -> list[Item]:
    random = np.random.default_rng(1)
    image = random.standard_normal((n, 12))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text = image + 0.1 * random.standard_normal((n, 12))
    text[wrong] = np.roll(text[wrong], 1, axis=0)
    both = np.concatenate([image, text], 1).astype(np.float32)
    return [Item(key=str(i), tensor=row, label=i % 3) for i, row in enumerate(both)]


def everything(pool: Growth, labels: NDArray[np.int64]) -> None:
    """All that draws, or might."""
    pool.sample(20)
    pool.choose(20, rounds=1)
    for policy in ("proportional", "two-phase"):
        list(pool.sampler(policy, epochs=2))  # type: ignore[arg-type]
    decision = pool.find("outlier", factor=1.0)
    pool.apply(decision)
    pool.undo(decision)
    pool.find("label issue")
    pool.evict(60)
    pool.forget(pool.ids[:5])
    pool.report()


@pytest.mark.parametrize("index", ["exact", "inverted", "graph"])
def test_no_global_generator_is_seeded_or_drawn_from(index: str) -> None:
    """The released loader seeds numpy's by the number of the epoch, on all ranks alike."""
    import cleanlab.filter  # noqa: F401  which draws from Python's as it is imported

    states: list[Callable[[], Any]] = [
        lambda: np.random.get_state()[1].tolist(),  # noqa: NPY002
        lambda: np.random.get_state()[2:],  # noqa: NPY002
        lambda: torch.get_rng_state().tolist(),
        python_random.getstate,
    ]
    before = [state() for state in states]
    labels = np.arange(200) % 4
    pool = Growth(encoder=same, index=index)
    pool.add(torch.from_numpy(rows(200)), labels=labels)
    everything(pool, labels)
    of_pairs = Growth(encoder=Pairs(), index=index)
    of_pairs.add(pairs(200, np.arange(200) % 10 == 9))
    of_pairs.sample(10)
    assert [state() for state in states] == before


def test_every_option_counts() -> None:
    """None is taken and then ignored, as the released code's ``skip_one`` is."""
    given = np.concatenate([rows(150), rows(150) + np.float32(0.004)])
    usual = grown(given)

    def differs(**options: Any) -> bool:
        other = grown(given, **options)
        return not np.array_equal(other.gains(), usual.gains(), equal_nan=True)

    assert not differs()
    assert differs(k=2)
    assert differs(published=True)
    assert differs(clean=False)
    assert differs(clean=Cleaning(copies=0.3))
    assert type(grown(given, index="graph")._members.main.index).__name__ == "Graph"
    drawn = usual.sample(40)
    assert not np.array_equal(grown(given, seed=1).sample(40), drawn)
    assert np.array_equal(grown(given).sample(40), drawn)
    first = grown(given).choose(40, rounds=1).places
    assert not np.array_equal(np.sort(grown(given).choose(40, rounds=8).places), first)
    wrong = np.arange(200) % 10 == 9
    dropped = []
    for share in (0.0, 0.01, 0.3):
        pool = Growth(encoder=Pairs(), clean=Cleaning(copies=-1, misaligned=share))
        pool.add(pairs(200, wrong))
        dropped.append(int((pool.reasons != 0).sum()))
    assert dropped[0] == 0
    assert dropped[1] > dropped[2] > 0


@pytest.mark.parametrize("common", [0.0, 5.0])
def test_the_threshold_of_alignment_is_the_encoders_own(common: float) -> None:
    """At common = 5 all true pairs have a cosine below 0.3, where the released rule keeps none."""
    wrong = np.arange(400) % 10 == 9
    given = pairs(400, wrong)
    made = Pairs(common)(given)
    assert made.second is not None
    true = np.einsum("nd,nd->n", made.main, made.second)[~wrong]
    assert (true > 0.4).all() if not common else (true < 0.3).all()
    pool = Growth(encoder=Pairs(common), clean=Cleaning(copies=-1))
    pool.add(given)
    out = pool.reasons != 0
    assert out[wrong].mean() > 0.85
    assert out[~wrong].mean() < 0.03


def test_thresholds_are_written_once() -> None:
    """The released rule has its constant in two places; here the command takes the library's."""
    usual = Cleaning()
    assert grow._USUAL["threshold"] == usual.copies
    assert grow._USUAL["misaligned"] == usual.misaligned
    pool = Growth(encoder=same)
    assert (grow._USUAL["k"], grow._USUAL["seed"]) == (pool.k, pool.seed)
    assert (grow._USUAL["index"], grow._USUAL["published"]) == (pool.index, pool.published)
    assert pool.clean == usual


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_an_epoch_by_gain_has_the_stated_length(share: float) -> None:
    """The released sampler passes over the data until N were drawn, at whatever length it ends."""
    pool = grown(rows(230))
    kept = len(pool.kept())
    sampler = pool.sampler("proportional", epochs=3, share=share, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == round(share * kept)
        assert max(epochs[-1]) < kept
    assert epochs[0] != epochs[1] != epochs[2]


def test_late_copies_of_early_items_take_nothing_from_a_budget() -> None:
    """Every item has 7 near copies, which arrive sorted behind all others; 30 % stay. By gains
    that are all refreshed and no groups, none of the copied would be covered.
    """
    plain, copied = rows(300, 1, dim=24), rows(60, 2, dim=24)
    noise = np.random.default_rng(3).standard_normal((420, 24)).astype(np.float32)
    late = np.repeat(copied, 7, axis=0) + 0.004 * noise
    given = np.concatenate([plain, copied, late])
    pool = grown(given)
    assert len(pool.kept()) == 360
    assert pool.report()["copies"]["groups"] == 60
    pool.evict(108)
    name = np.concatenate([np.arange(360), np.repeat(np.arange(300, 360), 7)])
    stay = name[pool.reasons == 0]
    assert len(np.unique(stay)) == len(stay) == 108  # no group twice
    covered = np.isin(np.arange(300, 360), stay).mean()
    single = np.isin(np.arange(300), stay).mean()
    assert covered >= 0.7 * single
