"""Where thresholds start, and how they hold a target."""

from __future__ import annotations

import math

import pytest
import torch
from routers import normal, router

from sparing.experts.losses import LossWeights

# ---- calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("start_k", [0.5, 1.0, 2.0, 3.5, 6.0])
def test_calibration_opens_as_many_gates_as_asked(start_k):
    made = router(16, max_experts=6, start_k=start_k, calibration=1)
    x = normal(500, 16) + 1  # a common direction: the cosines are far from centred
    routing = made(x)
    opened = (made.cosine(x) > made.threshold).sum(1)
    if start_k < 6:
        assert float(opened.float().mean()) == pytest.approx(start_k, abs=6 / 500)
        # and each expert the same, so that none is overloaded
        load = (made.cosine(x) > made.threshold).sum(0)
        assert load.tolist() == pytest.approx([500 * start_k / 6] * 6, abs=1)
    else:
        assert float(opened.float().mean()) > 5.98
    assert routing.k.equal(opened.clamp_min(1))
    assert made.calibrated == 1


def test_target_k_takes_the_place_of_start_k():
    made = router(16, max_experts=6, start_k=4.0, target_k=1.5, calibration=1)
    x = normal(500, 16)
    made(x)
    opened = (made.cosine(x) > made.threshold).sum(1)
    assert float(opened.float().mean()) == pytest.approx(1.5, abs=6 / 500)


def test_calibration_is_the_running_mean_of_its_batches_and_then_stops():
    made = router(16, max_experts=6, calibration=2)
    batches = [normal(300, 16, seed=seed) + seed for seed in range(3)]
    quantiles = [torch.quantile(made.cosine(x).detach(), 1 - 2 / 6, dim=0) for x in batches]
    made(batches[0])
    torch.testing.assert_close(made.threshold.detach(), quantiles[0])
    made(batches[1])
    both = (quantiles[0] + quantiles[1]) / 2
    torch.testing.assert_close(made.threshold.detach(), both)
    made(batches[2])
    torch.testing.assert_close(made.threshold.detach(), both)
    assert made.calibrated == 2


def test_calibration_is_of_real_tokens_in_training():
    made = router(16, max_experts=6, calibration=1)
    made.eval()(normal(100, 16))
    assert made.calibrated == 0
    assert not made.threshold.any()
    x, mask = normal(200, 16), torch.arange(200) < 120
    made.train()(torch.where(mask[:, None], x, x + 9), mask)
    alone = router(16, max_experts=6, calibration=1)
    alone(x[mask])
    assert made.threshold.equal(alone.threshold)


def test_calibration_waits_for_a_batch_with_tokens():
    made = router(16, max_experts=6, calibration=1)
    made(normal(4, 16), torch.zeros(4, dtype=torch.bool))
    made(normal(0, 16))
    assert made.calibrated == 0
    made(normal(100, 16))
    assert made.calibrated == 1


def test_calibration_leaves_inactive_slots_alone():
    made = router(16, max_experts=6, start_experts=4, calibration=1)
    made(normal(100, 16))
    assert made.threshold[:4].all()
    assert not made.threshold[4:].any()


@pytest.mark.parametrize(("share", "expected"), [("active", 2.0), ("slots", 2.0 * 3 / 6)])
def test_missing_experts_leave_their_share_or_not(share, expected):
    adapt = {"share": share}
    made = router(16, max_experts=6, start_experts=3, calibration=1, adapt=adapt)
    x = normal(600, 16)
    made(x)
    opened = (made.cosine(x) > made.threshold)[:, :3].sum(1)
    assert float(opened.float().mean()) == pytest.approx(expected, abs=6 / 600)


# ---- holding a target --------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_threshold_updates_drive_the_mean_to_the_target(target):
    made = router(16, max_experts=6, target_k=target)
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(16, generator=generator)
    seen = []
    for _ in range(200):
        x = torch.randn(400, 16, generator=generator) + shift
        routing = made(x)
        opened = routing.counts - torch.bincount(
            routing.experts[routing.unserved[routing.tokens]], minlength=6
        )
        seen.append(int(opened.sum()) / 400)
        made.update_thresholds(opened, torch.tensor(400))
    assert abs(seen[0] - target) > 0.3
    assert sum(seen[-20:]) / 20 == pytest.approx(target, rel=0.05)
    load = opened / 400
    assert load.tolist() == pytest.approx([target / 6] * 6, abs=0.1)


def test_threshold_updates_are_bounded_and_leave_inactive_slots_alone():
    made = router(16, max_experts=4, start_experts=3, target_k=1.5, rate=0.2)
    made.update_thresholds(torch.tensor([900, 50, 0, 700]), torch.tensor(100))
    step = 0.2 / math.sqrt(16)
    assert made.threshold.tolist() == pytest.approx([step, 0.0, -step, 0.0])
    for _ in range(100):
        made.update_thresholds(torch.tensor([900, 50, 0, 700]), torch.tensor(100))
    assert made.threshold.tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0])
    assert not made.threshold.requires_grad


@pytest.mark.parametrize("options", [{}, {"target_k": 2.0, "control": "loss"}, {"published": True}])
def test_thresholds_that_learn_are_not_steered(options):
    made = router(max_experts=4, **options)
    made.update_thresholds(torch.tensor([9, 0, 0, 0]), torch.tensor(9))
    assert not made.threshold.any()
    assert made.threshold.requires_grad


def test_no_tokens_steer_nothing():
    made = router(max_experts=4, target_k=2.0)
    made.update_thresholds(torch.zeros(4), torch.tensor(0))
    assert not made.threshold.any()


def test_the_target_k_loss_drives_the_mean_to_the_target():
    losses = LossWeights(target_k=1.0)
    made = router(16, max_experts=6, target_k=1.5, control="loss", losses=losses)
    optimizer = torch.optim.Adam([made.threshold], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(150):
        x = torch.randn(400, 16, generator=generator)
        routing = made(x)
        assert list(routing.losses) == ["target_k"]
        seen.append(float((made.cosine(x) > made.threshold).sum()) / 400)
        optimizer.zero_grad()
        routing.losses["target_k"].backward()
        optimizer.step()
    assert seen[0] > 2.5
    assert sum(seen[-20:]) / 20 == pytest.approx(1.5, rel=0.05)


def test_a_target_to_hold_by_loss_has_a_coefficient_even_if_none_is_given():
    made = router(max_experts=4, target_k=1.0, control="loss", losses=LossWeights())
    routing = made(normal(50, 8))
    mean = float((made.cosine(normal(50, 8)) > 0).sum()) / 50
    assert float(routing.losses["target_k"].detach()) == pytest.approx(0.01 * (mean - 1) ** 2)
