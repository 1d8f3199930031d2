"""A router's own random numbers: new in each training pass, the same in its recomputation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparing.experts import noise as module
from sparing.experts.noise import Noise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Noisy(nn.Module):
    """Multiplies by noise and keeps what it drew."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        self.noise = Noise(seed)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.noise.normal(x, x.shape[1])
        self.seen.append(drawn)
        return (x * drawn).sin()


def test_passes_draw_differently_and_repeat_from_the_seed():
    x = normal(5, 4)
    first, second = Noisy(), Noisy()
    drawn = [first.noise.normal(x, 3) for _ in range(3)]
    assert not drawn[0].equal(drawn[1])
    assert not drawn[1].equal(drawn[2])
    assert all(a.equal(second.noise.normal(x, 3)) for a in drawn)
    assert not Noise(4).normal(x, 3).equal(drawn[0])
    assert int(first.noise.draws) == 3


def test_values_are_of_the_distribution_and_dtype_asked_for():
    noise, x = Noise(0), normal(20_000, 2)
    standard, even = noise.normal(x, 4), noise.uniform(x, 4)
    assert abs(float(standard.mean())) < 0.02
    assert abs(float(standard.std()) - 1) < 0.02
    assert float(even.min()) >= 0
    assert float(even.max()) < 1
    assert abs(float(even.mean()) - 0.5) < 0.01
    # float64 routers, as references are, see the very numbers of float32 ones
    assert Noise(0).normal(x.double(), 4).equal(standard.double())


def test_saved_and_loaded_it_goes_on():
    whole, x = Noisy(), normal(5, 4)
    whole(x)
    resumed = Noisy()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert list(whole.state_dict()) == ["noise.draws"]
    clones = (resumed, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)))
    second = whole.noise.normal(x, 2)
    for clone in clones:
        assert clone.noise.normal(x, 2).equal(second)
    assert int(whole.noise.draws) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same_and_counts_nothing(reentrant):
    model, x = Noisy(), normal(5, 4).requires_grad_()
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.sum().backward()
    assert len(model.seen) == 2
    assert model.seen[0].equal(model.seen[1])
    assert int(model.noise.draws) == 1
    plain, again = Noisy(), x.detach().clone().requires_grad_()
    plain(again).sum().backward()
    assert again.grad is not None
    assert x.grad is not None
    assert again.grad.equal(x.grad)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_micro_batches_are_told_apart_whatever_the_order_of_their_backwards(order):
    model = Noisy()
    inputs = [normal(5, 4, seed=s).requires_grad_() for s in range(3)]
    outputs = [checkpoint(model, x, use_reentrant=False) for x in inputs]
    first = list(model.seen)
    for place in order:
        outputs[place].sum().backward()
        assert model.seen[-1].equal(first[place])
    assert int(model.noise.draws) == 3


def test_equal_inputs_of_one_backward_are_told_apart():
    model, x = Noisy(), normal(5, 4).requires_grad_()
    outputs = [checkpoint(model, x, use_reentrant=False) for _ in range(3)]
    first = list(model.seen)
    torch.stack([y.sum() for y in outputs]).sum().backward()
    assert sorted(float(s.sum()) for s in first) == sorted(float(s.sum()) for s in model.seen[3:])
    plain, again = Noisy(), x.detach().clone().requires_grad_()
    torch.stack([plain(again).sum() for _ in range(3)]).sum().backward()
    assert again.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(again.grad, x.grad)


def test_an_input_that_a_kernel_rounds_anew_is_found_again():
    model, x = Noisy(), normal(6, 4)
    model(normal(6, 4, seed=1))
    model(x)
    model(normal(6, 4, seed=2))

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            model(x + 1e-6)  # as a recomputation with other rounding would
            return grad

    Rounded.apply(x.clone().requires_grad_()).sum().backward()
    assert model.seen[-1].equal(model.seen[1])
    assert int(model.noise.draws) == 3


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 4)
    noise = Noise(0)
    for seed in range(10):
        noise.normal(normal(3, 2, seed=seed), 2)
    assert int((noise.recent[:, 0] >= 0).sum()) == 4
    assert int(noise.draws) == 10


def test_ranks_draw_differently(monkeypatch):
    x, drawn = normal(5, 4), []
    for number in range(2):
        monkeypatch.setattr(module, "rank", lambda number=number: number)
        drawn.append(Noise(3).normal(x, 3))
    assert not drawn[0].equal(drawn[1])
    monkeypatch.setattr(module, "rank", lambda: 0)
    assert Noise(3).normal(x, 3).equal(drawn[0])


def test_no_token_draws_nothing():
    assert Noise(0).normal(torch.zeros(0, 4), 3).shape == (0, 3)
