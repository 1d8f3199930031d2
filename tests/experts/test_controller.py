from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from typing import Any

import pytest
import torch
from planted import Run, small_layer
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

from sparing.core.errors import RequestError
from sparing.experts import frozen_slots
from sparing.experts.controller import ControllerOptions, ExpertController
from sparing.experts.course import Course, Verdict, remove_, wanted
from sparing.experts.frozen_slots import FrozenSlots, clear_moments_, moments, slot_parameters
from sparing.experts.layer import ExpertLayer
from sparing.experts.newcomer import two_means, worst_covered
from sparing.experts.statistics import Tally
from sparing.experts.usefulness import masked, output_changes

QUICK = {"every": 10, "warmup": 10, "trial": 1, "patience": 1, "statistics_every": 5}


def vector_layer() -> ExpertLayer:
    """The published router of the reference vector: 4 slots, 3 of them active, d = 3."""
    layer = small_layer(4, 3, 3, published=True)
    with torch.no_grad():
        rows = [[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0], [0.5, 0.5, 0]]
        layer.router.similarity.copy_(torch.tensor(rows))
        layer.router.threshold.copy_(torch.tensor([0.0, 0.2, 0.0, 0.6]))
    return layer.train()


VECTOR = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [-1.0, -1, -1], [1.0, 1, 0]])


def control(layer: ExpertLayer, **options: Any) -> ExpertController:
    return ExpertController([("layer", layer)], ControllerOptions(**options))


def copies(layer: ExpertLayer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in slot_parameters(layer)]


# ---- the published rule ------------------------------------------------------------------------


def test_published_addition_is_the_reference_vector():
    layer = vector_layer()
    controller = control(layer, every=1, warmup=1, remove="never")
    weights = [w[3].clone() for w in layer.experts.slots().values()]
    layer(VECTOR)
    assert layer.record.unserved_sum.tolist() == [-1, -1, -1]
    (event,) = controller.step(1)
    assert event == {
        "step": 1,
        "kind": "expert added",
        "layer": "layer",
        "expert": 3,
        "why": "1 of 4 tokens unserved",
    }
    assert torch.allclose(layer.router.similarity[3], torch.full((3,), -1 / math.sqrt(3)))
    assert layer.router.threshold[3] == 0
    assert layer.router.active.tolist() == [True] * 4
    # the released code revives a slot with the weights that it has
    now = [w[3] for w in layer.experts.slots().values()]
    assert all(a.equal(b) for a, b in zip(weights, now, strict=True))


def test_published_update_removes_then_adds_and_so_may_flap():
    layer = vector_layer()
    controller = control(layer, every=1, warmup=1)
    layer(VECTOR)
    events = controller.step(1)
    assert [(e["kind"], e["expert"]) for e in events] == [
        ("expert removed", 2),
        ("expert added", 2),
    ]


def test_published_rule_adds_nothing_when_all_are_served():
    layer = vector_layer()
    controller = control(layer, every=1, warmup=1, remove="never")
    layer(VECTOR[[0, 1, 3]])
    assert controller.step(1) == []


def test_published_rule_never_removes_the_last_expert():
    layer = vector_layer()
    with torch.no_grad():
        layer.router.threshold.fill_(1.0)
    controller = control(layer, every=1, warmup=1, add="never")
    layer(VECTOR)
    assert [e["expert"] for e in controller.step(1)] == [2, 1]
    assert layer.router.active.tolist() == [True, False, False, False]


def test_published_window_counts_only_the_last_steps_before_an_update():
    layer = vector_layer()
    controller = control(layer, every=6, warmup=6, window=2, remove="never")
    steps_seen = []
    for step in range(1, 13):
        layer(VECTOR)
        controller.step(step)
        steps_seen.append(int(controller._window["layer"].tokens) // 4)
    # an update empties the window
    assert steps_seen == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]


# ---- when --------------------------------------------------------------------------------------


def test_updates_come_at_their_steps_and_end():
    layer = small_layer(target_k=1.0).train()
    controller = control(layer, every=5, warmup=10, freeze_after=0.5, usefulness="output")
    controller.plan(50)
    at = []
    for step in range(1, 51):
        layer(torch.randn(8, 8, generator=torch.Generator().manual_seed(step)))
        before = controller.updates
        controller.step(step)
        if controller.updates > before:
            at.append(step)
    assert at == [10, 15, 20, 25]


def test_no_newcomer_comes_too_late_to_be_judged():
    def course_of(steps: int) -> list[str]:
        layer = small_layer(6, 2, target_k=1.0).train()
        controller = control(layer, **(QUICK | {"freeze_after": 1.0, "remove": "never"}))
        controller.plan(steps)
        kinds = []
        for step in range(1, steps + 1):
            layer(torch.randn(64, 8, generator=torch.Generator().manual_seed(step)))
            kinds += [e["kind"] for e in controller.step(step)]
        return kinds

    assert course_of(20) == []
    assert course_of(40)[:1] == ["expert added"]


def test_a_step_without_tokens_changes_nothing():
    layer = small_layer(target_k=1.0).train()
    controller = control(layer, every=1, warmup=1)
    before = copies(layer)
    assert controller.step(1) == []
    assert all(a.equal(b) for a, b in zip(before, slot_parameters(layer), strict=True))


# ---- every step --------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "expected"), [("slots", 2 / 8), ("active", 2 / 4)])
def test_thresholds_steer_each_expert_to_its_share(share, expected):
    layer = small_layer(8, 4, 16, target_k=2.0, rate=0.2).train()
    controller = control(layer, share=share, remove="never", add="never", statistics_every=50)
    generator, load = torch.Generator().manual_seed(0), torch.zeros(8)
    for step in range(1, 301):
        layer(torch.randn(512, 16, generator=generator))
        if step > 250:
            load += layer.record.load - layer.record.fallback
        controller.step(step)
    if share == "active":  # all rows count, so that the mean k is the target
        assert controller.history.layers["layer"]["mean_k"][-1] == pytest.approx(2.0, rel=0.05)
    else:
        assert (load[:4] / (50 * 512)).tolist() == pytest.approx([expected] * 4, rel=0.1)
    assert load[4:].sum() == 0


def test_running_means_follow_the_experts_outputs():
    layer = small_layer(4, 3, 8, closed_gates="mean").train()
    controller = control(layer, decay=0.5)
    generator = torch.Generator().manual_seed(1)
    expected = torch.zeros(4, 8)
    for step in range(1, 4):
        layer(torch.randn(64, 8, generator=generator))
        record = layer.record
        now = record.output_sum / record.load.clamp_min(1)[:, None]
        for expert in range(4):
            if record.load[expert]:
                first = not expected[expert].any()
                expected[expert] = now[expert] if first else (expected[expert] + now[expert]) / 2
        controller.step(step)
        assert torch.allclose(layer.output_mean, expected)
    assert expected[:3].any(1).all()
    assert not expected[3].any()


def test_evaluation_leaves_no_trace():
    quiet, noisy = (Run(start=2, adapt=ControllerOptions(**QUICK)) for _ in range(2))
    for _ in range(3):
        quiet.train(10)
        noisy.train(10)
        noisy.layer.eval()
        noisy.layer(noisy.held[0])
        noisy.layer.train()
    assert quiet.controller.history.to_dict() == noisy.controller.history.to_dict()
    assert quiet.events == noisy.events
    assert quiet.events


def test_activation_checkpointing_changes_no_number():
    class Checkpointed(nn.Module):
        def __init__(self, layer: ExpertLayer, on: bool) -> None:
            super().__init__()
            self.layer, self.on = layer, on

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.layer, x, use_reentrant=False) if self.on else self.layer(x)

    seen = []
    for on in (False, True):
        run = Run(start=2, adapt=ControllerOptions(**QUICK))
        model = Checkpointed(run.layer, on)
        events = []
        for step in range(1, 31):
            x, y, _ = run.data.batch(64, run.generator)
            run.optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            run.optimizer.step()
            run.layer.take_losses()
            events += run.controller.step(step, run.optimizer, probe=run.probe)
        seen.append((events, run.controller.history.to_dict(), copies(run.layer)))
    assert seen[0][0] == seen[1][0]
    assert seen[0][0]
    assert seen[0][1] == seen[1][1]
    assert all(a.equal(b) for a, b in zip(seen[0][2], seen[1][2], strict=True))


def test_python_work_does_not_grow_with_the_tokens():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for size in (64, 4096):
        layer = small_layer(4, 4, 8, target_k=2.0).train()
        controller = control(layer)
        layer(torch.randn(size, 8, generator=torch.Generator().manual_seed(0)))
        with Counting() as counting:
            controller.step(1)
        counts.append(counting.calls)
    assert counts[0] == counts[1]
    assert 0 < counts[0] < 80


# ---- the default rule --------------------------------------------------------------------------


RULE: dict[str, Any] = ControllerOptions(patience=2, trial=2).resolved(published=False)


def judged(layer: ExpertLayer, change: list[float]) -> Verdict:
    return Verdict("output", change, 0.02)


def test_an_expert_goes_after_patience_and_only_one_at_a_time():
    layer = small_layer(4, 4)
    course, window = Course.of(4), Tally(4, 8)
    useless = judged(layer, [0.5, 0.01, 0.005, 0.3])
    assert remove_(layer, RULE, course, window, useless) == []
    ((gone, why),) = remove_(layer, RULE, course, window, useless)
    assert gone == 2
    assert "0.0050 < 0.02" in why
    assert layer.router.active.tolist() == [True, True, False, True]


def test_an_expert_that_recovers_is_counted_anew():
    layer = small_layer(4, 4)
    course, window = Course.of(4), Tally(4, 8)
    bad, good = judged(layer, [0.01, 1, 1, 1]), judged(layer, [1.0, 1, 1, 1])
    for verdict in (bad, good, bad, good):
        assert remove_(layer, RULE, course, window, verdict) == []
    assert course.weak == [0, 0, 0, 0]


def test_min_experts_is_kept():
    layer = small_layer(4, 2)
    course = Course.of(4)
    rule = RULE | {"min_experts": 2, "patience": 1}
    bad = judged(layer, [0.0, 0.0, math.inf, math.inf])
    assert remove_(layer, rule, course, Tally(4, 8), bad) == []


def want(course: Course, unserved: int, layer: ExpertLayer | None = None, **more: Any) -> bool:
    window = Tally(6, 8)
    window.tokens += 1000
    window.unserved += unserved
    window.load += 200
    arguments = {"verdict": None, "removed": False, "left": math.inf} | more
    return wanted(layer or small_layer(), RULE, course, window, **arguments) is not None


def test_one_comes_when_independent_gates_would_leave_fewer_unserved():
    level = round(1000 * (math.exp(-1.2) + 0.05))  # 6 slots of load 200 in 1000 tokens: k = 1.2
    assert want(Course.of(6), level + 2)
    assert not want(Course.of(6), level - 2)
    # a router with a target is measured by the target
    assert want(Course.of(6), 250, small_layer(target_k=2.0))
    assert not want(Course.of(6), 150, small_layer(target_k=2.0))
    # too few experts per token do not excuse themselves: k counts as at least 1
    few = small_layer(target_k=0.5)
    assert want(Course.of(6), 700, few)


def test_none_comes_while_the_layer_is_unsettled():
    assert not want(Course.of(6), 900, removed=True)
    assert not want(Course(weak=[1] * 6, left=[0] * 6), 900)
    assert not want(Course(weak=[0] * 6, left=[0] * 6, watch=1), 900)
    assert not want(Course(weak=[0] * 6, left=[0] * 6, wait=1), 900)
    assert not want(Course.of(6), 900, small_layer(6, 6))
    assert not want(Course.of(6), 900, left=3)


def test_none_comes_while_the_last_one_is_hardly_worth_its_place():
    for worth, comes in ((0.0039, False), (0.0041, True)):
        verdict = Verdict("loss", [0.1, worth, 0.2] + [math.inf] * 3, 0.002)
        assert want(Course.of(6), 900, verdict=verdict) is comes


def test_each_rejected_newcomer_makes_the_next_wait_longer():
    course, waits = Course.of(4), []
    for _ in range(7):
        course.pass_(removed=True, rule=RULE)
        waits.append(course.wait)
    assert waits == [1, 2, 4, 8, 16, 16, 16]
    course.arrive(0, RULE)
    for _ in range(5):
        course.pass_(removed=False, rule=RULE)
    assert (course.trial, course.watch, course.wait, course.backoff) == (0, 0, 11, 1)


def test_a_newcomer_takes_the_slot_that_was_free_for_longest():
    layer = small_layer(6, 3, target_k=1.0, calibration=0).train()
    with torch.no_grad():
        layer.router.threshold.fill_(1.0)
    controller = control(layer, **(QUICK | {"every": 1, "warmup": 1, "remove": "never"}))
    controller._courses["layer"].left = [0, 0, 0, 7, 5, 6]
    layer(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    (event,) = controller.step(1)
    assert event["expert"] == 4


# ---- what an expert is worth -------------------------------------------------------------------


def test_usefulness_is_of_function_not_of_load():
    layer = small_layer(3, 3, 8, target_k=1.0)
    with torch.no_grad():
        for weight in layer.experts.slots().values():
            weight[1] = weight[0]
        # 1 is 0's twin in all but a little of its direction, 2 looks elsewhere
        layer.router.similarity[1] = layer.router.similarity[0] + 0.01 * torch.eye(8)[3]
        layer.router.threshold.fill_(1.0)
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    (change,) = output_changes([layer], [x])
    assert change[:2].max() < 0.01
    assert change[2] > 0.05
    load = layer.router(x).counts
    assert load.min() > 20


def test_usefulness_leaves_the_layer_as_it_was():
    layer = small_layer(4, 3).train()
    state = copy.deepcopy(layer.state_dict())
    (change,) = output_changes([layer], [torch.randn(32, 8)])
    assert change[3] == math.inf
    assert layer.router.training
    assert int(layer.record.tokens) == 0
    assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())
    with pytest.raises(ZeroDivisionError), masked(layer.router, 0):
        raise ZeroDivisionError
    assert layer.router.active[0]


def test_the_probe_decides_where_output_and_loss_disagree():
    # all outputs are far from 0, so every expert changes the output, but the loss ignores them
    def events(probe: Any) -> list[str]:
        layer = small_layer(4, 4, target_k=2.0).train()
        controller = control(layer, **(QUICK | {"add": "never"}))
        kinds = []
        for step in range(1, 21):
            layer(torch.randn(64, 8, generator=torch.Generator().manual_seed(step)))
            kinds += [e["kind"] for e in controller.step(step, probe=probe)]
        return kinds

    assert events(None) == []
    assert events(lambda: torch.tensor(1.0)) == ["expert removed"] * 2


# ---- newcomers ---------------------------------------------------------------------------------


def test_two_means_finds_two_clusters():
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(60) < 20
    x = torch.where(cluster[:, None], torch.eye(8)[0], torch.eye(8)[1])
    x = nn.functional.normalize(x + 0.2 * torch.randn(60, 8, generator=generator), dim=1)
    half = two_means(x)
    assert half.equal(cluster) or half.equal(~cluster)
    two_means(torch.eye(3)[[0, 0]])  # nothing to split


def test_the_worst_covered_cluster_is_found():
    layer = small_layer(4, 2, 8)
    with torch.no_grad():
        layer.router.similarity.copy_(torch.eye(8)[:4])
        layer.router.threshold.fill_(0.9)
    generator = torch.Generator().manual_seed(0)
    # clusters at axes 0 and 1 have an expert; 4 and 5 do not, and lean a little to expert 1
    centres = torch.eye(8)[[0, 1, 4, 5]]
    centres[2:, 1] = 0.3
    x = centres.repeat_interleave(40, 0) + 0.05 * torch.randn(160, 8, generator=generator)
    row, incumbent = worst_covered(x, layer.router)
    assert incumbent == 1
    assert max(float(row @ centres[2]), float(row @ centres[3])) > 0.99
    # the mean of all that is unserved lies between the two and is close to neither
    mean = nn.functional.normalize(x[80:].mean(0), dim=0)
    assert max(float(mean @ centres[2]), float(mean @ centres[3])) < 0.9


@pytest.mark.parametrize("start", ["copy", "mean", "fresh"])
def test_a_newcomers_weights_threshold_and_moments(start):
    adapt = ControllerOptions(**QUICK, newcomer=start, remove="never", add="any")
    run = Run(start=2, slots=4, adapt=adapt).train(9)
    for parameter in slot_parameters(run.layer):
        for value in moments(run.optimizer, parameter).values():
            value.fill_(3.0)  # as if the slot had been in use before
    run.backward()
    run.optimizer.step()
    before = [w.detach().clone() for w in run.layer.experts.slots().values()]
    state = torch.random.get_rng_state()
    (event,) = run.controller.step(10, run.optimizer, probe=run.probe)
    assert torch.random.get_rng_state().equal(state)
    slot = event["expert"]
    for weight, was in zip(run.layer.experts.slots().values(), before, strict=True):
        near = (was[:2] - weight[slot]).abs().flatten(1).mean(1).min()
        spread = was[:2].std()
        mean = (was[:2].mean(0) - weight[slot]).abs().mean()
        if start == "copy":
            assert 0 < near < 0.05 * spread
        elif start == "mean":
            assert 0 < mean < 0.05 * spread
        else:
            assert near > 0.05 * spread
        assert weight[:2].equal(was[:2])
    for parameter in slot_parameters(run.layer):
        for value in moments(run.optimizer, parameter).values():
            assert not value[slot].any()
            assert value[:2].any()
    with torch.no_grad():
        x = run.data.batch(512, run.generator)[0]
        opened = (run.layer.router.cosine(x)[:, slot] > run.layer.router.threshold[slot]).float()
    assert float(opened.mean()) == pytest.approx(1 / 4, abs=0.1)


# ---- inactive slots ----------------------------------------------------------------------------


OPTIMIZERS = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.Adafactor, {"lr": 1e-2, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("optimizer", "rates"), OPTIMIZERS)
def test_inactive_slots_stay_bit_identical(optimizer, rates):
    fixed = ControllerOptions(remove="never", add="never")
    router = {"published": True}  # whose simplicity loss pulls at inactive rows too
    run = Run(start=4, slots=6, router=router, adapt=fixed, optimizer=optimizer, **rates)
    run.train(3)
    with torch.no_grad():
        run.layer.router.active[1] = False  # with weights and moments from its use

    def idle() -> list[torch.Tensor]:
        rows = []
        for parameter in slot_parameters(run.layer):
            rows += [parameter[[1, 4, 5]]]
            rows += [v[[1, 4, 5]] for v in moments(run.optimizer, parameter).values()]
        return [row.detach().clone() for row in rows]

    before, others = idle(), copies(run.layer)
    run.train(3)
    assert all(a.equal(b) for a, b in zip(before, idle(), strict=True))
    now = copies(run.layer)
    assert all(not a[0].equal(b[0]) for a, b in zip(others[:3], now[:3], strict=True))
    # without the guard they drift
    run.controller.frozen.remove()
    run.train(3)
    assert not all(a.equal(b) for a, b in zip(before, idle(), strict=True))


def test_a_slot_never_used_has_zero_moments():
    run = Run(start=2, slots=4, router={"published": True}, weight_decay=0.1)
    run.train(2)
    for parameter in slot_parameters(run.layer):
        for value in moments(run.optimizer, parameter).values():
            assert not value[2:].any()


def test_the_guard_ends_with_its_owner_and_ignores_other_optimizers():
    layer = small_layer(4, 2)
    before = len(frozen_slots._living())
    guard = FrozenSlots([layer])
    assert len(frozen_slots._living()) == before + 1
    other = nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    optimizer = torch.optim.SGD([other], lr=1.0)
    optimizer.step()
    assert other.tolist() == [0.0] * 4
    again = pickle.loads(pickle.dumps(guard))
    assert len(frozen_slots._living()) == before + 2
    del guard, again
    gc.collect()
    assert len(frozen_slots._living()) == before


def test_a_guard_may_die_in_the_midst_of_any_step():
    # garbage collection comes when it likes; torch walks its process-wide hooks meanwhile
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guards = [FrozenSlots([small_layer(4, 2)]) for _ in range(3)]

    def collect(*_) -> None:
        guards.clear()
        gc.collect()

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(collect),
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: None),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert not guards
    assert weight.tolist() == [0.0] * 4


def test_another_optimizer_may_step_between_the_hooks_of_one():
    # two threads that train: the second's step must not lose the rows kept for the first's
    run = Run(start=2, slots=4, router={"published": True}, weight_decay=0.1)
    run.train(2)
    other = nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    nested = torch.optim.SGD([other], lr=1.0)
    run.optimizer.register_step_pre_hook(lambda *_: nested.step() and None)
    before = copies(run.layer)
    run.train(2)
    now = copies(run.layer)
    assert all(a[2:].equal(b[2:]) for a, b in zip(before, now, strict=True))
    assert not all(a[:2].equal(b[:2]) for a, b in zip(before, now, strict=True))


def test_moments_are_cleared_behind_a_wrapper():
    run = Run(start=2, slots=4)
    run.train(2)

    class Wrapped:
        optimizer = run.optimizer

    clear_moments_(Wrapped(), slot_parameters(run.layer), 0)
    for parameter in run.layer.experts.slots().values():
        for value in moments(run.optimizer, parameter).values():
            assert not value[0].any()
            assert value[1].any()


# ---- saved and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize(("published", "at"), [(False, 23), (True, 13)])
def test_killed_and_resumed_is_bit_identical(published, at):
    def new() -> Run:
        router = {"published": True} if published else {"target_k": 1.0}
        return Run(start=2, slots=6, router=router, adapt=ControllerOptions(**QUICK))

    whole = new().train(57)
    first = new().train(at)  # in the middle of a window and of a point
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = new()
    second.load(torch.load(file, weights_only=True))
    second.train(57 - at)
    assert first.events + second.events == whole.events
    assert first.events
    assert second.events
    weights = second.layer.state_dict()
    assert all(value.equal(weights[name]) for name, value in whole.layer.state_dict().items())
    assert second.controller.history.to_dict() == whole.controller.history.to_dict()
    assert second.controller.signals() == whole.controller.signals()
    mine, theirs = second.controller.state_dict(), whole.controller.state_dict()
    assert mine.pop("generator").equal(theirs.pop("generator"))
    assert str(mine) == str(theirs)


def test_a_controller_of_other_layers_is_refused():
    layer = small_layer()
    state = control(layer).state_dict()
    other = ExpertController([("another", layer)])
    with pytest.raises(RequestError, match=r"\['layer'\].*\['another'\]"):
        other.load_state_dict(state)
    with pytest.raises(RequestError, match="different names"):
        ExpertController([("same", layer), ("same", small_layer())])


def test_a_controller_can_be_copied():
    run = Run(start=2, slots=4, adapt=ControllerOptions(**QUICK)).train(15)
    twin = copy.deepcopy(run)
    run.train(15)
    twin.train(15)
    assert run.events == twin.events
    assert all(a.equal(b) for a, b in zip(copies(run.layer), copies(twin.layer), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"patience": 0},
        {"window": 0},
        {"warmup": -1},
        {"margin": float("nan")},
        {"freeze_after": 1.5},
        {"remove": "sometimes"},
        {"newcomer": "twin"},
    ],
)
def test_bad_options_are_refused(options):
    (name,) = options
    with pytest.raises(RequestError, match=name):
        ControllerOptions(**options)


# ---- the true number of experts ----------------------------------------------------------------


def settled(seed: int, start: int, steps: int = 1200, **more: Any) -> tuple[Run, list[int]]:
    # splitting a cluster between two experts lowers this loss by up to 1 %
    adapt = ControllerOptions(every=40, warmup=80, loss_tolerance=0.01)
    run = Run(start=start, seed=seed, adapt=adapt, **more).train(steps)
    return run, run.alive[-300:]


def assert_settled(alive: list[int], planted: int) -> None:
    """At the planted number ±1, newcomers on trial included."""
    assert {planted - 1, planted, planted + 1} >= set(alive)


@pytest.mark.parametrize("start", [1, 8])
def test_the_number_of_experts_settles_at_the_planted_number(start):
    run, last = settled(0, start)
    assert_settled(last, 4)
    assert float(run.probe()) < 0.11  # the noise alone is 0.09; one expert for all reaches 0.125


@pytest.mark.slow
@pytest.mark.parametrize("use_probe", [True, False])
@pytest.mark.parametrize("start", [1, 8])
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_it_settles_on_other_seeds_and_without_a_probe(seed, start, use_probe):
    _, last = settled(seed, start, steps=1600, use_probe=use_probe)
    assert_settled(last, 4)


@pytest.mark.slow
def test_it_settles_at_another_number():
    _, last = settled(0, 1, steps=1800, clusters=6)
    assert_settled(last, 6)
