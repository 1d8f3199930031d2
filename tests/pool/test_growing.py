"""A training set that grows: what is kept does not depend on when it came, and counts are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparing
from sparing.core.clock import Clock
from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Setup
from sparing.pool.gain import expected, published
from sparing.pool.items import REASONS
from sparing.pool.training import growing, reading
from sparing.pool.training.method import GrowthSelection
from sparing.pool.training.options import GrowthOptions
from sparing.samples.gains import probabilities

NEAR, SAME, DOUBTED = (REASONS.index(r) for r in ("near copy", "same content", "label issue"))
UNCLEAN = {"duplicates": 0.0, "label_issues": False}


def rows(size: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(size, dim, generator=random), dim=1)


def clusters(size: int, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(size) % classes
    centres = rows(classes, 24, seed + 1)
    return F.normalize(centres[labels] + 0.4 * rows(size, 24, seed), dim=1), labels


def distances(vectors: torch.Tensor, before: bool = False) -> np.ndarray:
    """Ascending distances to all others, or to those that came before, +inf where there are none.

    In float64, by brute force.
    """
    wide = vectors.double().numpy()
    far = 1 - wide @ wide.T
    np.fill_diagonal(far, np.inf)
    if before:
        far[np.triu_indices(len(far))] = np.inf
    return np.sort(np.maximum(far, 0), axis=1)[:, : len(far) - 1]


# ---- gains ---------------------------------------------------------------------------------------


def test_gains_are_those_of_the_rule_by_brute_force():
    vectors = rows(60)
    late = growing.grow(vectors, None, GrowthOptions(rule="published", **UNCLEAN))
    np.testing.assert_allclose(late.gains, published(distances(vectors, before=True)), atol=2e-3)
    few = rows(11)  # all others are among the neighbours that are kept
    found = growing.grow(few, None, GrowthOptions(**UNCLEAN))
    np.testing.assert_allclose(found.gains, expected(distances(few), 10), atol=2e-3)


def test_the_published_rule_favours_what_came_first_and_the_default_does_not():
    vectors, labels = clusters(1200, classes=12)
    ratio = {}
    for rule in ("published", "expected"):
        gains = growing.grow(vectors, labels, GrowthOptions(rule=rule, **UNCLEAN)).gains
        ratio[rule] = gains[:120].mean() / gains[-120:].mean()
    assert ratio["published"] > 1.3
    assert 0.95 < ratio["expected"] < 1.05


@pytest.mark.parametrize("how", ["given", "shuffled", "by class"])
def test_gains_do_not_depend_on_the_order_of_arrival(how):
    vectors, labels = clusters(300)
    options = GrowthOptions(arrival=how, label_issues=False, duplicates=0.01)
    found = growing.grow(vectors, labels, options, seed=3)
    plain = growing.grow(
        vectors, labels, GrowthOptions(label_issues=False, duplicates=0.01), seed=3
    )
    np.testing.assert_array_equal(found.reasons, plain.reasons)
    np.testing.assert_array_equal(found.group, plain.group)
    clean = plain.clean
    # what lies beyond the neighbours that are kept is learnt from a sample
    np.testing.assert_allclose(found.gains[clean], plain.gains[clean], rtol=0.03, atol=2e-3)
    assert sorted(found.arrived.tolist()) == list(range(300))
    if how == "by class":
        assert (np.diff(labels.numpy()[np.argsort(found.arrived)]) >= 0).all()


# ---- cleaning ------------------------------------------------------------------------------------


def test_of_copies_one_stays_whatever_the_order_and_doubted_labels_go():
    vectors, labels = clusters(400)
    copies = torch.cat([vectors, vectors[:40], F.normalize(vectors[40:60] + 1e-3, dim=1)])
    classes = torch.cat([labels, labels[:60]])
    wrong = torch.arange(100, 130)
    classes[wrong] = (classes[wrong] + 1) % 5
    found = growing.grow(copies, classes, GrowthOptions(duplicates=1e-3))
    counts = np.bincount(found.reasons, minlength=len(REASONS))
    assert counts[SAME] == 40
    assert counts[NEAR] == 20
    # a copy and its original have one representative, which is one of them and stays
    pairs = np.stack([np.arange(400, 460), np.arange(60)], 1)
    assert (found.group[pairs[:, 0]] == found.group[pairs[:, 1]]).all()
    assert ((found.group[pairs] == pairs).sum(1) == 1).all()
    hit = np.flatnonzero(found.reasons == DOUBTED)
    right = np.isin(hit, wrong.numpy()).sum()
    assert right >= 27
    assert right / hit.size > 0.8
    assert np.isnan(found.gains[found.reasons != 0]).all()
    assert np.isfinite(found.gains[found.reasons == 0]).all()
    # turned around, the same stand for the others: twins are the same, whichever stays
    back = torch.arange(459, -1, -1)
    other = growing.grow(copies[back], classes[back], GrowthOptions(duplicates=1e-3))
    assert torch.equal(copies[back][other.group][back], copies[found.group])


def test_of_copies_with_several_labels_one_of_the_most_stays():
    vectors = rows(30)
    copies = torch.cat([vectors, vectors[:5], vectors[:5]])
    labels = torch.cat([torch.arange(30) % 3, (torch.arange(5) + 1) % 3, (torch.arange(5) + 1) % 3])
    for order in (torch.arange(40), torch.arange(39, -1, -1)):
        options = GrowthOptions(label_issues=False, duplicates=1e-3)
        found = growing.grow(copies[order], labels[order], options)
        stays = order[torch.from_numpy(found.reasons == 0)]
        held = dict(
            zip(stays[stays >= 30].tolist(), labels[stays[stays >= 30]].tolist(), strict=True)
        )
        assert len(held) == 5
        assert not set(range(5)) & set(stays.tolist())


# ---- the choice ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(2, 60),
    keep=st.floats(0.01, 1.0),
    dropped=st.integers(0, 59),
    zeros=st.booleans(),
    seed=st.integers(0, 5),
)
def test_exactly_as_many_as_asked_are_kept(size, keep, dropped, zeros, seed):
    random = np.random.default_rng(seed)
    gains = np.zeros(size, np.float32) if zeros else random.random(size).astype(np.float32)
    gains[random.permutation(size)[: min(dropped, size - 1)]] = np.nan
    kept = growing.drawn(gains, GrowthOptions(keep=keep), seed)
    clean = int((~np.isnan(gains)).sum())
    assert int(kept.sum()) == min(max(1, round(keep * size)), clean)
    assert not kept[np.isnan(gains)].any()


def test_what_is_kept_is_in_proportion_to_gain():
    gains = np.repeat(np.array([1.0, 3.0], np.float32), 200)
    kept = sum(growing.drawn(gains, GrowthOptions(keep=0.05), seed) for seed in range(400))
    ratio = kept[200:].sum() / kept[:200].sum()
    assert 2.7 < ratio < 3.3


# ---- the method ----------------------------------------------------------------------------------


def method(**options) -> GrowthSelection:
    vectors, labels = clusters(200)
    made = sparing.GrowthSelection(vectors=vectors, labels=labels, **options)
    made.bind(size=200, epochs=6, seed=2)
    return made


def test_static_takes_the_same_part_in_each_epoch_in_another_order():
    made = method(keep=0.3)
    plans = [made.order(Clock(epoch=epoch)).index for epoch in range(3)]
    assert [len(plan) for plan in plans] == [60] * 3
    assert len({tuple(sorted(plan.tolist())) for plan in plans}) == 1
    assert not torch.equal(plans[0], plans[1])


def test_proportional_draws_anew_among_clean_samples_only():
    made = method(keep=0.3, sampling="proportional", duplicates=0.05)
    plans = [made.order(Clock(epoch=epoch)).index for epoch in range(3)]
    assert [len(plan) for plan in plans] == [60] * 3
    assert len({tuple(sorted(plan.tolist())) for plan in plans}) == 3
    assert np.isin(torch.cat(plans).numpy(), made.grown.clean).all()


def test_two_phases_are_as_long_as_the_gains_make_them_and_take_no_share():
    phases = method(keep=1.0, sampling="two-phase", duplicates=0.05)
    plans = [phases.order(Clock(epoch=epoch)).index.numpy() for epoch in (1, 2)]
    gains = phases.grown.gains
    assert gains[plans[0]].mean() > gains[plans[1]].mean()
    chance = probabilities(gains[phases.grown.clean])
    assert len(plans[0]) == pytest.approx(chance.sum(), abs=1)
    assert len(plans[1]) == pytest.approx(np.maximum(1 - chance, 0.1).sum(), abs=1)
    with pytest.raises(RequestError, match=r"has no share to keep; got keep 0\.25"):
        GrowthOptions(sampling="two-phase")
    # chance takes as many samples in each epoch
    instead = GrowthSelection.at_random(phases.to_dict(), phases.signals())
    assert instead == {"random-samples": {"lengths": phases.lengths()}}


def test_chance_at_the_same_cost_takes_as_many_and_cleans_nothing():
    made = method(keep=1.0, duplicates=0.05)
    made.order(Clock())
    instead = GrowthSelection.at_random(made.to_dict(), made.signals())
    assert list(instead) == ["growth"]
    control = method(**instead["growth"])
    assert len(control.order(Clock()).index) == len(made.order(Clock()).index) < 200
    assert (control.grown.reasons == 0).all()
    assert control.grown.flops == 0
    assert GrowthSelection.at_random(instead["growth"], {}) is None


def test_the_ledger_has_what_growing_cost_once():
    made, ledger = method(keep=0.5), Ledger()
    made.order(Clock())
    for _ in range(2):
        made.account(ledger)
    assert ledger.spent("flops") == made.grown.flops == 200 * 200 * 24
    assert ledger.dense("flops") == 0
    again = method(keep=0.5)
    again.load_state_dict(made.state_dict())
    again.account(ledger)
    assert ledger.spent("flops") == made.grown.flops


def test_without_samples_it_says_what_to_give():
    lost = sparing.GrowthSelection(size=10, epochs=2)
    with pytest.raises(RequestError, match="growth has seen no sample"):
        lost.order(Clock())
    other = sparing.GrowthSelection(vectors=rows(8), size=10, epochs=2)
    with pytest.raises(RequestError, match="8 vectors for 10 samples"):
        other.order(Clock())
    with pytest.raises(RequestError, match="cannot arrive by class"):
        growing.grow(rows(8), None, GrowthOptions(arrival="by class"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep must be above 0"),
        ({"keep": 1.2}, "keep must be"),
        ({"rule": "expectd"}, 'unknown rule of gain "expectd"; did you mean "expected"'),
        ({"sampling": "all"}, "unknown sampling by gain"),
        ({"arrival": "sorted"}, "unknown order of arrival"),
        ({"k": 0}, "k must be at least 1"),
        ({"duplicates": -1}, "duplicates must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RequestError, match=message):
        sparing.GrowthSelection(**options)


# ---- reading a training set ----------------------------------------------------------------------


def images(size: int = 40) -> torch.Tensor:
    random = torch.Generator().manual_seed(4)
    return torch.randint(0, 255, (size, 3, 16, 16), generator=random, dtype=torch.uint8)


def test_a_hosts_samples_come_in_order_with_labels_or_domains():
    held, classes = images(), torch.arange(40) % 4
    setup = Setup(read=lambda i: {"images": held[i], "labels": classes[i]}, size=40)
    found = reading.read(setup, "pixels")
    assert found.labels.tolist() == classes.tolist()
    assert found.vectors.shape[0] == len(set(found.marks.tolist())) == 40
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(40))
    plain = Setup(read=lambda i: held[i], size=40, domain_of=lambda i: i % 3)
    assert reading.read(plain, "pixels").labels.tolist() == [i % 3 for i in range(40)]
    nothing = Setup(read=lambda i: {"name": ["a"]}, size=40)
    with pytest.raises(RequestError, match=r"found none in \['name'\]"):
        reading.read(nothing, "pixels")
    with pytest.raises(RequestError, match="this host cannot"):
        reading.read(Setup(), "pixels")


def test_ids_of_tokens_are_counted_not_measured():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5], [900, 901, 902, 903]])
    found = reading.counted(ids)
    near = found @ found.T
    assert float(near[0, 1]) == pytest.approx(1)
    assert 0.3 < float(near[0, 2]) < 0.95
    assert abs(float(near[0, 3])) < 0.3


def test_vectors_of_a_network_are_kept_by_content_and_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    class Network:
        dim, version = 5, "network-1"

        def __call__(self, items):
            calls.append(len(items))
            with torch.no_grad():
                flat = torch.stack([torch.from_numpy(i.tensor).float().flatten() for i in items])
                weight = torch.ones(flat.shape[1], 5).cumsum(1)
                main = flat @ weight + torch.arange(1.0, 6.0)
            return type("V", (), {"main": main.numpy(), "second": None})()

    monkeypatch.setattr(reading.encoders, "encoder", lambda name, **options: Network())
    held = images()
    setup = Setup(read=lambda i: {"images": held[i]}, size=40)
    first = reading.read(setup, "network")
    second = reading.read(setup, "network")
    assert calls == [40]
    assert torch.equal(first.vectors, second.vectors)
    assert first.flops == second.flops == 40 * 2 * 768 * 5
    held[7, 0, 0, 0] += 1  # other content is another data set
    reading.read(setup, "network")
    assert calls == [40, 40]
    Network.version = "network-2"
    reading.read(setup, "network")
    assert calls == [40, 40, 40]
    for file in (tmp_path / "sparing" / "growth").iterdir():
        file.write_bytes(b"torn")
    assert torch.equal(reading.read(setup, "network").vectors[:7], first.vectors[:7])
    assert len(calls) == 4


def test_what_is_drawn_lowers_the_chance_of_its_copies():
    """Ten groups of 8 near copies and 80 single samples: 20 % taken, few groups twice."""
    single, centres = rows(80, 64, 1), rows(10, 64, 2)
    copies = F.normalize(centres.repeat_interleave(8, 0) + 0.02 * rows(80, 64, 3), dim=1)
    vectors = torch.cat([single, copies])
    twice = covered = 0
    for seed in range(20):
        found = growing.grow(vectors, None, GrowthOptions(keep=0.2, **UNCLEAN), seed=seed)
        assert int(found.kept.sum()) == 32
        taken = np.bincount(np.flatnonzero(found.kept[80:]) // 8, minlength=10)
        covered += (taken > 0).sum()
        twice += (taken > 2).sum()
    assert covered / 200 > 0.6
    assert twice / 200 < 0.05
