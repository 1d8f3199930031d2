from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.updates.muon import Muon, orthogonalize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=seed + i)) for i, shape in enumerate(shapes)]


def give(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * step + i)


# ---- orthogonal updates ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 5), (5, 1), (3, 12, 20)])
def test_the_result_is_nearly_orthogonal(shape):
    singular = torch.linalg.svdvals(orthogonalize(normal(*shape, seed=3)))
    assert float(singular.max()) < 1.25
    # the smallest of a square matrix may begin too small for five iterations
    assert float(singular.median()) > 0.65
    if shape[-1] != shape[-2]:
        assert float(singular.min()) > 0.65


def test_enough_of_the_singular_vectors_stay():
    matrix = normal(12, 30)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest = left @ right
    found = orthogonalize(matrix)
    assert float((found * nearest).sum() / (found.norm() * nearest.norm())) > 0.97
    # the polynomial is odd: it changes singular values and never their vectors
    core = left.t() @ found @ right.t()
    off = core - torch.diag(core.diagonal())
    assert float(off.abs().max()) < 1e-5


def test_the_length_of_the_gradient_does_not_matter():
    matrix = normal(10, 20)
    for factor in (1e-6, 1e6):
        torch.testing.assert_close(
            orthogonalize(factor * matrix), orthogonalize(matrix), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("shape", [(4, 10, 20), (4, 20, 10), (2, 3, 8, 8)])
def test_stacked_is_one_by_one(shape):
    stack = normal(*shape)
    whole = orthogonalize(stack)
    assert whole.shape == stack.shape
    parts = [orthogonalize(one) for one in stack.reshape(-1, *shape[-2:])]
    torch.testing.assert_close(whole.reshape(-1, *shape[-2:]), torch.stack(parts))


def test_tall_is_the_transpose_of_wide():
    matrix = normal(9, 21)
    torch.testing.assert_close(orthogonalize(matrix.t()), orthogonalize(matrix).t())


def test_matrices_of_zeros_stay_zero_among_others():
    stack = normal(5, 6, 8)
    stack[[1, 4]] = 0
    found = orthogonalize(stack)
    assert not found[[1, 4]].any()
    alive = [0, 2, 3]
    torch.testing.assert_close(found[alive], orthogonalize(stack[alive]))
    assert not orthogonalize(torch.zeros(4, 4)).any()
    assert not orthogonalize(torch.zeros(2, 4, 4)).any()


def test_other_layouts_and_types():
    matrix = normal(20, 6).t()
    torch.testing.assert_close(orthogonalize(matrix), orthogonalize(matrix.contiguous()))
    half = orthogonalize(matrix.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), orthogonalize(matrix), atol=0.05, rtol=0)
    torch.testing.assert_close(
        orthogonalize(matrix.double()).float(), orthogonalize(matrix), atol=1e-4, rtol=1e-4
    )


# ---- steps -------------------------------------------------------------------------------------


SHAPES = [(12, 20), (20, 12), (16, 16), (12, 20)]


def against_torch(**options: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    ours = parameters(*SHAPES)
    theirs = copy.deepcopy(ours)
    mine = Muon(ours, **options)
    torchs = torch.optim.Muon(theirs, **options)
    for step in range(5):
        give(ours, step)
        give(theirs, step)
        mine.step()
        torchs.step()
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "weight_decay": 0.0},
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1},
    ],
)
def test_steps_are_torchs_in_single_precision(options, monkeypatch):
    # torch's iterates in bfloat16; without that rounding it is the same rule
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    for a, b in zip(*against_torch(**options), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_steps_are_torchs_up_to_its_rounding():
    start = parameters(*SHAPES)
    for a, b, first in zip(*against_torch(lr=0.02, weight_decay=0.0), start, strict=True):
        moved = (a - first).detach()
        assert 0 < float((a - b).detach().norm()) < 0.03 * float(moved.norm())


def test_the_first_step_by_hand():
    (p,) = parameters((20, 5))
    before, grad = p.detach().clone(), normal(20, 5, seed=9)
    p.grad = grad.clone()
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    momentum = 0.1 * grad
    update = orthogonalize(0.1 * grad + 0.9 * momentum)
    expected = before * (1 - 0.1 * 0.5) - 0.1 * (20 / 5) ** 0.5 * update
    torch.testing.assert_close(p.detach(), expected)
    assert p.grad.equal(grad)


def test_a_stack_moves_as_its_matrices_do():
    (stack,) = parameters((4, 10, 6))
    alone = [nn.Parameter(one.detach().clone()) for one in stack]
    together = Muon([stack], lr=0.05, weight_decay=0.1)
    apart = Muon(alone, lr=0.05, weight_decay=0.1)
    for step in range(4):
        give([stack], step)
        assert stack.grad is not None
        for one, grad in zip(alone, stack.grad, strict=True):
            one.grad = grad.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([one.detach() for one in alone]))


def test_slices_without_a_gradient_stay_and_the_rest_moves():
    (stack,) = parameters((4, 6, 8))
    before = stack.detach().clone()
    optimizer = Muon([stack], lr=0.05)
    for step in range(3):
        give([stack], step)
        assert stack.grad is not None
        stack.grad[[0, 2]] = 0
        optimizer.step()
    assert stack[[0, 2]].equal(before[[0, 2]])
    assert not optimizer.state[stack]["momentum"][[0, 2]].any()
    assert (stack[[1, 3]] - before[[1, 3]]).abs().amax((1, 2)).min() > 0.01
    assert torch.isfinite(stack).all()


def test_parameters_without_a_gradient_are_passed_over():
    first, second, third = parameters((4, 6), (4, 6), (3,))
    groups = [{"params": [first, second]}, {"params": [third], "rule": "adamw"}]
    optimizer = Muon(groups, weight_decay=0.1)
    first.grad = normal(4, 6)
    before = [p.detach().clone() for p in (first, second, third)]
    optimizer.step()
    assert not first.equal(before[0])
    assert second.equal(before[1])
    assert third.equal(before[2])
    assert set(optimizer.state) == {first}


def test_a_closure_is_called_with_gradients_on():
    (p,) = parameters((4, 6))
    optimizer = Muon([p], lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert first is not None
    assert second is not None
    assert second < first


def test_it_learns_a_linear_map():
    target, x = normal(6, 10), normal(200, 10, seed=1)
    (p,) = parameters((6, 10), seed=2)
    optimizer, start = Muon([p]), (x @ (p.detach() - target).t()).square().mean()
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 100)
        optimizer.zero_grad()
        loss = (x @ (p - target).t()).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.detach() < 0.01 * start


# ---- the AdamW part ----------------------------------------------------------------------------


def test_groups_of_rule_adamw_are_torchs_adamw():
    ours = parameters((7,), (4, 6), (2, 3, 4))
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    mine = Muon([{"params": ours, "rule": "adamw", **options}])
    torchs = torch.optim.AdamW(theirs, **options)
    for step in range(10):
        give(ours, step)
        give(theirs, step)
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_each_group_has_its_rule_and_rate():
    matrix, vector = parameters((6, 6), (6,))
    before = vector.detach().clone()
    groups = [
        {"params": [matrix], "lr": 0.0},
        {"params": [vector], "rule": "adamw", "lr": 0.1},
    ]
    optimizer = Muon(groups)
    still = matrix.detach().clone()
    give([matrix, vector], 0)
    optimizer.step()
    assert matrix.equal(still)
    # the first step of Adam is the rate, by the gradient's sign
    assert vector.grad is not None
    torch.testing.assert_close(before - vector.detach(), 0.1 * vector.grad.sign())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"betas": (0.9, -1)}, r"each of betas must be in \[0, 1\], got -1"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        Muon(parameters((3, 3)), **options)


# ---- state -------------------------------------------------------------------------------------


def both(params: list[nn.Parameter]) -> Muon:
    return Muon([{"params": params[:2]}, {"params": params[2:], "rule": "adamw", "lr": 0.01}])


def test_saved_and_resumed_is_bit_identical():
    whole = parameters((3, 6, 8), (8, 4), (5,))
    parts = copy.deepcopy(whole)
    uncut, first = both(whole), both(parts)
    for step in range(8):
        give(whole, step)
        uncut.step()
    for step in range(4):
        give(parts, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    parts = [nn.Parameter(p.detach().clone()) for p in parts]
    second = both(parts)
    second.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 8):
        give(parts, step)
        second.step()
    assert all(a.equal(b) for a, b in zip(whole, parts, strict=True))
    assert second.param_groups[1]["rule"] == "adamw"


def test_state_names_are_known_to_what_clears_moments():
    params = parameters((3, 6, 8), (8, 4), (5,))
    optimizer = both(params)
    give(params, 0)
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"momentum"}
    assert optimizer.state[params[0]]["momentum"].shape == params[0].shape
    assert set(optimizer.state[params[2]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_slots_without_an_expert_stay_bit_identical():
    from sparing.experts.experts import Experts
    from sparing.experts.frozen_slots import FrozenSlots, slot_parameters
    from sparing.experts.layer import ExpertLayer
    from sparing.experts.top_any import TopAnyOptions, TopAnyRouter

    options = TopAnyOptions(max_experts=4, calibration=0)
    layer = ExpertLayer(TopAnyRouter(8, options), Experts(8, 12, 4)).train()
    with torch.no_grad():
        for weight in layer.experts.slots().values():
            weight.copy_(0.1 * normal(*weight.shape))
    groups = [
        {"params": layer.experts.parameters(), "weight_decay": 0.1},
        {"params": layer.router.parameters(), "rule": "adamw", "weight_decay": 0.1},
    ]
    optimizer = Muon(groups, lr=0.02)

    def train(first: int) -> None:
        for step in range(first, first + 3):
            optimizer.zero_grad()
            layer(normal(32, 8, seed=step)).square().mean().backward()
            optimizer.step()

    guard = FrozenSlots([layer])
    train(0)
    with torch.no_grad():
        layer.router.active[2] = False

    def idle() -> list[Tensor]:
        held = [p for q in slot_parameters(layer) for p in (q, *optimizer.state[q].values())]
        return [value[2].detach().clone() for value in held if value.ndim]

    before = idle()
    assert len(before) > 8
    train(3)
    assert all(a.equal(b) for a, b in zip(before, idle(), strict=True))
    guard.remove()
    train(6)
    assert not all(a.equal(b) for a, b in zip(before, idle(), strict=True))


# ---- wrong requests ----------------------------------------------------------------------------


def test_vectors_are_refused_by_name():
    with pytest.raises(RequestError, match=r'number 1 has shape \(5,\).*rule="adamw"'):
        Muon(parameters((3, 4), (5,)))
    named = [("head.weight", nn.Parameter(normal(3, 4))), ("head.bias", nn.Parameter(normal(3)))]
    with pytest.raises(RequestError, match=r"head\.bias has shape \(3,\)"):
        Muon(named)


def test_unknown_rules_are_refused():
    with pytest.raises(RequestError, match='"muon" or "adamw", got "sgd"'):
        Muon([{"params": parameters((3, 4)), "rule": "sgd"}])
