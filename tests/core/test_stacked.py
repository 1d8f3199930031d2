from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparing.core.errors import RequestError
from sparing.core.stacked import Stacked, mix, stacked_parameters


class Pair(nn.Module):
    def __init__(self, up: int = 4, down: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(up, 3, 2))
        self.down = nn.Parameter(torch.ones(down, 2))
        self.shared = nn.Parameter(torch.ones(2))

    def slots(self) -> dict[str, nn.Parameter]:
        return {"up": self.up, "down": self.down}


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 100))
def test_mix_is_the_weighted_sum_over_slots(slots, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a": torch.randn(slots, 3, 2, generator=generator, dtype=torch.float64),
        "b": torch.randn(slots, generator=generator, dtype=torch.float64),
    }
    share = torch.rand(batch, slots, generator=generator, dtype=torch.float64)
    mixed = mix(weights, share)
    assert mixed["a"].shape == (batch, 3, 2)
    assert mixed["b"].shape == (batch,)
    torch.testing.assert_close(mixed["a"], torch.einsum("bk,kij->bij", share, weights["a"]))
    torch.testing.assert_close(mix(weights, share[0])["a"], mixed["a"][0])
    torch.testing.assert_close(mix(weights, share[0])["b"], mixed["b"][0])


def test_a_one_hot_share_picks_one_slot_and_only_it_has_gradient():
    weight = torch.randn(3, 2, 2, requires_grad=True)
    share = torch.tensor([0.0, 1.0, 0.0])
    picked = mix({"w": weight}, share)["w"]
    assert picked.equal(weight[1])
    picked.sum().backward()
    assert weight.grad is not None
    assert weight.grad[1].equal(torch.ones(2, 2))
    assert weight.grad[[0, 2]].eq(0).all()


def test_mix_has_correct_gradients_in_both():
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    share = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, s: mix({"w": w}, s)["w"], (weight, share))


@pytest.mark.parametrize("weight", [torch.ones(3, 2), torch.tensor(1.0)])
def test_mix_rejects_another_number_of_slots(weight):
    with pytest.raises(RequestError, match=r'"w" has shape .* mixes 2 slots'):
        mix({"w": weight}, torch.ones(2))


def test_mix_rejects_a_share_of_three_axes():
    with pytest.raises(RequestError, match="share must be"):
        mix({}, torch.ones(1, 1, 1))


def test_stacked_parameters_are_found_by_their_full_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Pair()))
    assert isinstance(model[1][0], Stacked)
    assert not isinstance(model[0], Stacked)
    found = stacked_parameters(model)
    named = dict(model.named_parameters())
    assert set(found) == {"1.0.up", "1.0.down"}
    assert all(named[name] is parameter for name, parameter in found.items())
    assert set(stacked_parameters(Pair())) == {"up", "down"}


def test_slots_of_one_module_must_agree():
    with pytest.raises(RequestError, match='"0" declares slots of different numbers'):
        stacked_parameters(nn.Sequential(Pair(up=4, down=5)))
