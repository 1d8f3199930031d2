"""The threshold of alignment: planted mismatches, other encoders' scales, copies, streams."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.core.errors import RequestError
from sparing.pool.alignment import LEAST, Alignment, calibrate, cosines
from sparing.pool.encoders import unit
from sparing.pool.items import Vectors


def pairs(
    seed: int, size: int, wrong: float, offset: float = 0.0, noise: float = 1.0
) -> tuple[Vectors, np.ndarray]:
    """Image-text pairs of a dual encoder; ``offset`` is a mean that all texts share."""
    drawn = np.random.default_rng(seed)
    meaning = drawn.standard_normal((size, 48))
    bad = drawn.random(size) < wrong
    said = meaning.copy()
    said[bad] = drawn.standard_normal((int(bad.sum()), 48))
    shared = offset * drawn.standard_normal(48)
    main = unit(meaning + noise * drawn.standard_normal(said.shape) + shared)[0]
    second = unit(said + noise * drawn.standard_normal(said.shape) - shared)[0]
    return Vectors(main=main, second=second), bad


@pytest.mark.parametrize(("offset", "noise"), [(0.0, 0.6), (0.8, 0.6), (0.0, 0.9)])
def test_planted_mismatches_fall_whatever_the_scale_of_the_encoder(
    offset: float, noise: float
) -> None:
    vectors, bad = pairs(0, 3000, 0.2, offset, noise)
    found = calibrate(vectors, false_keep=0.01)
    kept = cosines(vectors) >= found.threshold
    assert kept[bad].mean() < 0.025
    assert kept[~bad].mean() > 0.85
    assert found.false_keep <= 0.011
    assert found.kept == pytest.approx(kept.mean())
    assert found.telling > 0.8


def test_a_constant_of_04_would_drop_nearly_all_of_an_encoder_with_low_cosines() -> None:
    vectors, bad = pairs(1, 2000, 0.1, offset=0.8)
    assert (cosines(vectors)[~bad] < 0.4).mean() > 0.9
    found = calibrate(vectors)
    assert (cosines(vectors)[~bad] >= found.threshold).mean() > 0.6


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_wrong_pairs_are_kept_at_the_stated_share(share: float) -> None:
    vectors, _ = pairs(2, 4000, 0.0)
    found = calibrate(vectors, false_keep=share)
    fresh, _ = pairs(3, 8000, 1.0)
    assert (cosines(fresh) >= found.threshold).mean() == pytest.approx(share, rel=0.6)


def test_many_copies_of_one_caption_do_not_raise_the_threshold() -> None:
    vectors, _ = pairs(4, 1000, 0.0)
    assert vectors.second is not None
    main, second = vectors.main.copy(), vectors.second.copy()
    main[:500], second[:500] = main[0], second[0]
    copied = calibrate(Vectors(main=main, second=second)).threshold
    assert copied == pytest.approx(calibrate(vectors).threshold, abs=0.12)
    assert copied < float(main[0] @ second[0])


def test_an_encoder_that_cannot_tell_drops_nothing() -> None:
    vectors, _ = pairs(5, 500, 1.0)
    found = calibrate(vectors)
    assert found.threshold == -np.inf
    assert "cannot tell" in found.detail
    few = calibrate(pairs(5, LEAST - 1, 0.0)[0])
    assert few.threshold == -np.inf
    assert "too few" in few.detail
    one = np.ones((100, 4), np.float32) / 2
    assert "all alike" in calibrate(Vectors(main=one, second=one)).detail


def test_a_stream_ends_near_the_threshold_of_the_whole_and_goes_on_from_its_state() -> None:
    vectors, bad = pairs(6, 6000, 0.2, noise=0.6)
    assert vectors.second is not None
    gate, again = Alignment(sample=1000, seed=3), Alignment(sample=1000, seed=3)
    parts = [
        Vectors(main=vectors.main[at : at + 250], second=vectors.second[at : at + 250])
        for at in range(0, 6000, 250)
    ]
    assert not gate.misaligned(parts[0]).any()
    for at, part in enumerate(parts):
        gate.observe_(part)
        if at == 9:
            again.load(gate.state())
        elif at > 9:
            again.observe_(part)
    assert gate.calibration == again.calibration
    assert gate.calibration.pairs == 1000
    assert gate.calibration.threshold == pytest.approx(calibrate(vectors).threshold, abs=0.06)
    found = gate.misaligned(vectors)
    assert found[bad].mean() > 0.95
    assert found[~bad].mean() < 0.1


def test_the_sample_of_a_stream_is_even_over_time() -> None:
    size, sample = 5000, 500
    when = np.arange(size, dtype=np.float32)
    counts = np.zeros(5)
    for seed in range(10):
        gate = Alignment(sample=sample, seed=seed)
        for at in range(0, size, 125):
            marked = np.stack([when[at : at + 125], np.ones(125, np.float32)], 1)
            gate.observe_(Vectors(main=marked, second=marked))
        held = gate.state()["main"][:, 0]
        assert len(np.unique(held)) == sample
        counts += np.histogram(held, bins=5, range=(0, size))[0]
    # 1000 expected in each fifth; a standard deviation is about 28
    assert np.abs(counts - 1000).max() < 120


def test_pairs_need_texts_and_a_share_that_makes_sense() -> None:
    alone = Vectors(main=np.ones((3, 2), np.float32))
    with pytest.raises(RequestError, match="CLIP"):
        Alignment().observe_(alone)
    with pytest.raises(RequestError, match="false_keep"):
        Alignment(false_keep=0.9)
    with pytest.raises(RequestError, match="sample"):
        Alignment(sample=3)
