"""The rules that every router keeps, on all routers that give tokens experts by score or chance."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sparing
from sparing.experts.expert_choice import ExpertChoice
from sparing.experts.experts import Experts
from sparing.experts.hash import HashExperts
from sparing.experts.layer import ExpertLayer
from sparing.experts.method import RoutedExperts
from sparing.experts.noisy_top_k import NoisyTopK
from sparing.experts.random import RandomExperts
from sparing.experts.router import Router
from sparing.experts.routing import Routing
from sparing.experts.sigmoid import SigmoidTopK
from sparing.experts.switch import Switch
from sparing.experts.top_k import TopK

EXPERTS, DIM = 6, 8
GROUPS = {"groups": 3, "groups_kept": 2}
METHODS: dict[str, RoutedExperts] = {
    "top-k": TopK(experts=EXPERTS, k=2),
    "top-k in groups": TopK(experts=EXPERTS, k=3, **GROUPS),
    "noisy": NoisyTopK(experts=EXPERTS, k=2, losses={"importance": 1, "load": 1, "z": 1}),
    "switch": Switch(experts=EXPERTS, losses={"balance": 1, "z": 1}),
    "sigmoid": SigmoidTopK(experts=EXPERTS, k=2, losses={"balance": 1, "z": 1}),
    "sigmoid in groups": SigmoidTopK(experts=EXPERTS, k=2, **GROUPS),
    "expert choice": ExpertChoice(experts=EXPERTS, k=2, losses={"z": 1}),
    "random": RandomExperts(experts=EXPERTS, k=1.5),
    "hash": HashExperts(experts=EXPERTS, k=2),
}
EXACT = {
    "top-k": 2, "top-k in groups": 3, "noisy": 2, "switch": 1, "sigmoid": 2, "sigmoid in groups": 2,
    "hash": 2,
}  # fmt: skip
LEARNED = [name for name in METHODS if name not in ("random", "hash")]
DRAWING = ["noisy", "switch", "random"]
every = pytest.mark.parametrize("name", METHODS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def router(name: str, seed: int = 5) -> Router:
    return METHODS[name].router(DIM, seed).train()


def layer_of(name: str) -> ExpertLayer:
    experts = Experts(DIM, 16, EXPERTS)
    experts.init_(generator=torch.Generator().manual_seed(0))
    return ExpertLayer(router(name), experts).train()


def map_of(routing: Routing) -> Tensor:
    found = torch.full((routing.k.shape[0], EXPERTS), -1.0, dtype=routing.weights.dtype)
    found[routing.tokens, routing.experts] = routing.weights.detach()
    return found


def step(made: Router, x: Tensor) -> None:
    """What a controller does after an optimizer step."""
    routing = made(x)
    made.update_thresholds(routing.counts, torch.tensor(x.shape[0]))


@every
@modes
def test_rows_are_well_formed(name, training):
    made = router(name).train(training)
    routing = made(normal(50, DIM))
    assert routing.counts.equal(torch.bincount(routing.experts, minlength=EXPERTS))
    assert routing.k.equal(torch.bincount(routing.tokens, minlength=50))
    assert routing.weights.shape == routing.tokens.shape
    order = routing.experts * 50 + routing.tokens
    assert (order[1:] > order[:-1]).all()
    assert (routing.weights >= 0).all()
    if name in EXACT:
        assert routing.k.tolist() == [EXACT[name]] * 50
    if not training:
        assert routing.losses == {}


@every
@modes
def test_padding_gets_no_rows(name, training):
    made = router(name).train(training)
    routing = made(normal(40, DIM), normal(40, seed=1) > 0)
    real = normal(40, seed=1) > 0
    assert not routing.k[~real].any()
    assert routing.k[real].any()
    if routing.unserved is not None:
        assert not routing.unserved[~real].any()


@pytest.mark.parametrize("name", [n for n in METHODS if n not in DRAWING])
def test_padding_changes_no_other_token_and_no_loss(name):
    # (of routers that draw, noise is by place in the batch)
    made, x, real = router(name), normal(40, DIM), normal(40, seed=1) > 0
    padded, alone = made(x, real), made(x[real])
    torch.testing.assert_close(map_of(padded)[real], map_of(alone))
    for loss, value in padded.losses.items():
        torch.testing.assert_close(value, alone.losses[loss])


@every
@modes
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_real_token_gives_no_rows(name, training, tokens):
    made = router(name).train(training)
    routing = made(normal(tokens, DIM).requires_grad_(), torch.zeros(tokens, dtype=torch.bool))
    assert routing.rows == 0
    assert routing.counts.tolist() == [0] * EXPERTS
    total = routing.weights.sum() + sum(routing.losses.values(), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    if made.similarity.grad is not None:
        assert not made.similarity.grad.any()
    made.update_thresholds(routing.counts, torch.tensor(0))
    assert all(torch.isfinite(value.float()).all() for value in made.state_dict().values())


@every
@modes
def test_inactive_slots_are_never_taken(name, training):
    made = router(name)
    made.active[[0, 4]] = False
    step(made, normal(50, DIM, seed=3))
    made.train(training)
    routing = made(normal(50, DIM))
    assert not routing.counts[[0, 4]].any()
    assert routing.counts[made.active].any()
    if name in EXACT:
        assert routing.k.tolist() == [EXACT[name]] * 50
    total = (routing.weights * normal(routing.rows)).sum() + sum(routing.losses.values())
    if name in LEARNED:
        total.backward()
        assert made.similarity.grad is not None
        assert torch.isfinite(made.similarity.grad).all()
        assert not made.similarity.grad[[0, 4]].any()
    made.active[:] = torch.arange(EXPERTS) == 2
    assert int(made(normal(50, DIM)).k.max()) == 1


@every
@pytest.mark.parametrize("after", [0, 3])
def test_in_evaluation_a_token_is_routed_alike_in_any_batch(name, after):
    made = router(name).double()
    for seed in range(after):
        step(made, normal(50, DIM, seed=seed, dtype=torch.float64))
    x = normal(30, DIM, seed=9, dtype=torch.float64)
    made.eval()
    alone = torch.cat([map_of(made(x[t : t + 1])) for t in range(30)])
    torch.testing.assert_close(map_of(made(x)), alone)
    torch.testing.assert_close(map_of(made(x.flip(0))).flip(0), alone)


@every
def test_half_precision_is_routed_in_single(name):
    made = router(name).eval()
    x = normal(40, DIM).bfloat16()
    half, single = made(x), made(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made(x.float())
    for other in (half, cast):
        assert other.weights.dtype == torch.float32
        assert map_of(other).equal(map_of(single))


@every
def test_a_layer_trains_in_half_precision(name):
    layer = layer_of(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(normal(4, 30, DIM))
    assert y.dtype == torch.bfloat16
    (y.float().square().mean() + sum(layer.take_losses().values())).backward()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.any()
            assert torch.isfinite(parameter.grad).all()


@every
def test_what_has_no_gradient_asks_for_none(name):
    made = router(name)
    assert any(p.requires_grad for p in made.parameters()) == (name in LEARNED)
    assert made(normal(20, DIM)).weights.requires_grad == (name in LEARNED)


@every
def test_recomputation_repeats_the_pass(name):
    results = []
    for on in (False, True):
        layer, x = layer_of(name), normal(3, 20, DIM).requires_grad_()
        for seed in range(2):  # two passes wait for one backward
            part = x * (seed + 1)
            y = checkpoint(layer, part, use_reentrant=False) if on else layer(part)
            (y.square().sum() + sum(layer.take_losses().values())).backward()
        layer.router.update_thresholds(layer.record.load, layer.record.tokens)
        results.append((x.grad, {n: p.grad for n, p in layer.named_parameters()},
                        layer.router.state_dict(), layer.record.load))  # fmt: skip
    (a, b, c, d), (e, f, g, h) = results
    assert a.equal(e)
    assert d.equal(h)
    for left, right in ((b, f), (c, g)):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert (value is None and right[key] is None) or value.equal(right[key])


@every
def test_evaluation_leaves_no_trace(name):
    made = router(name)
    step(made, normal(20, DIM))
    before = copy.deepcopy(made.state_dict())
    made.eval()
    for seed in range(3):
        made(normal(20, DIM, seed=seed))
    assert all(value.equal(before[key]) for key, value in made.state_dict().items())


@every
def test_state_saved_and_loaded_continues_bit_for_bit(name):
    made = router(name)
    for seed in range(3):
        step(made, normal(20, DIM, seed=seed))
    other = router(name)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for clone in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        fresh = router(name)
        fresh.load_state_dict(copy.deepcopy(made.state_dict()))
        assert map_of(clone(normal(20, DIM))).equal(map_of(fresh(normal(20, DIM))))


@pytest.mark.parametrize("name", DRAWING)
def test_training_passes_differ_and_repeat_from_the_seed(name):
    made, again, other = router(name), router(name), router(name, seed=6)
    x = normal(200, DIM)
    first, second = map_of(made(x)), map_of(made(x))
    assert not first.equal(second)
    assert map_of(again(x)).equal(first)
    assert map_of(again(x)).equal(second)
    assert not map_of(other(x)).equal(first)


@every
def test_the_global_generator_is_neither_seeded_nor_drawn_from(name):
    before = torch.random.get_rng_state()
    made = router(name)
    step(made, normal(20, DIM))
    made.eval()(normal(20, DIM))
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("name", [n for n in LEARNED if n not in DRAWING])
@modes
def test_equal_scores_go_to_the_lowest(name, training):
    made = router(name).train(training)
    with torch.no_grad():
        made.similarity.zero_()
    routing = made(normal(12, DIM))
    if name == "expert choice" and training:  # T k / E tokens of each expert, the first ones
        assert routing.counts.tolist() == [4] * EXPERTS
        assert routing.k.tolist() == [EXPERTS] * 4 + [0] * 8
        return
    taken = EXACT.get(name, 2)
    assert routing.counts.tolist() == [12] * taken + [0] * (EXPERTS - taken)


@every
def test_the_method_knows_its_sizes(name: str):
    method: Any = METHODS[name]
    assert method.slots == EXPERTS
    assert method.expected_k == method.options.k
    assert method.causal == type(router(name)).causal == (name != "expert choice")
    assert type(method).from_dict(method.to_dict()).options == method.options


@every
def test_a_trained_model_is_saved_and_loaded_with_all_that_its_routers_know(name, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sparing.moefy_(LlamaForCausalLM(config), METHODS[name], seed=3).train()
    controller = sparing.ExpertController(model)
    ids = torch.arange(24).view(2, 12)
    for at in range(1, 4):
        model(input_ids=(ids + at) % 30)
        controller.step(at)
    sparing.save(model, tmp_path / "model")
    loaded = sparing.load(tmp_path / "model")
    assert loaded(input_ids=ids).logits.equal(model.eval()(input_ids=ids).logits)
    # and goes on drawing where training stopped
    logits = [m.train()(input_ids=ids).logits for m in (model, loaded)]
    assert logits[0].equal(logits[1])
