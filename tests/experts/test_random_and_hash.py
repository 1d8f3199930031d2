"""Routing without learning: by chance, and by a hash of the token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparing
from sparing.core.errors import RequestError
from sparing.experts.hash import HashExperts, HashExpertsOptions, HashRouter
from sparing.experts.layer import expert_layers
from sparing.experts.random import RandomExperts, RandomExpertsOptions, RandomRouter
from sparing.experts.token_hash import mix, projection, sign_codes, uniform


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chance(dim: int = 16, seed: int = 0, **options: Any) -> RandomRouter:
    return RandomRouter(dim, RandomExpertsOptions(**options), seed).train()


def hashed(dim: int = 16, seed: int = 0, **options: Any) -> HashRouter:
    return HashRouter(dim, HashExpertsOptions(**options), seed).train()


def near(count: int, of: int, share: float) -> bool:
    """Whether a count is within five standard deviations of its expectation."""
    return abs(count - of * share) < 5 * math.sqrt(of * share * (1 - share)) + 1e-9


def pairs_of(routing: Any, experts: int) -> dict[tuple[int, int], int]:
    taken = torch.zeros(routing.k.shape[0], experts, dtype=torch.bool)
    taken[routing.tokens, routing.experts] = True
    return {
        (a, b): int((taken[:, a] & taken[:, b]).sum())
        for a, b in itertools.combinations(range(experts), 2)
    }


# ---- random --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [0.4, 1, 1.8, 3, 5])
def test_the_mean_number_of_experts_is_k_and_experts_are_alike(k, training):
    made = chance(experts=5, k=k).train(training)
    tokens = 20_000
    routing = made(normal(tokens, 16))
    least, extra = math.floor(k), k - math.floor(k)
    assert set(routing.k.tolist()) <= {least, least + 1}
    if extra == 0:
        assert routing.k.tolist() == [least] * tokens
    # in evaluation tokens of one code share their draw: fewer independent draws than tokens
    draws = tokens if training else len(sign_codes(normal(tokens, 16), made.directions).unique())
    scale = draws / tokens
    assert near(int((routing.k > least).sum() * scale), draws, extra)
    for count in routing.counts.tolist():
        assert near(int(count * scale), draws, k / 5)
    weights = 1.0 / routing.k[routing.tokens]
    torch.testing.assert_close(routing.weights, weights)


@pytest.mark.parametrize("training", [True, False])
def test_every_pair_of_experts_is_as_likely(training):
    routing = chance(experts=4, k=2).train(training)(normal(20_000, 16))
    for count in pairs_of(routing, 4).values():
        assert 0.9 < count / (20_000 / 6) < 1.1


def test_in_evaluation_passes_repeat_and_layers_differ():
    x = normal(500, 16)
    made, other = chance(experts=8, k=1).eval(), chance(experts=8, k=1, seed=1).eval()
    assert made(x).tokens.equal(made(x).tokens)
    assert int((made(x).counts > 0).sum()) == 8
    assert not made(x).tokens.equal(other(x).tokens)


def test_the_choice_in_evaluation_is_stable_under_rounding():
    x = normal(4000, 16)
    made = chance(experts=8, k=1).eval()
    first, second = made(x), made(x * (1 + 1e-6 * normal(4000, 16, seed=1)))
    moved = (first.experts[first.tokens.argsort()] != second.experts[second.tokens.argsort()]).sum()
    assert int(moved) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be above 0 and at most experts \(8\), got 0"),
        ({"k": 8.5}, r"k must be above 0 and at most experts \(8\), got 8.5"),
        ({"k": float("nan")}, "k must be"),
        ({"experts": 0}, "experts must be at least 1, got 0"),
        ({"losses": {}}, 'RandomExperts has no option "losses"'),
    ],
)
def test_bad_options_of_random_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        RandomExperts(**options)


# ---- hash ----------------------------------------------------------------------------------------


def test_a_token_id_always_takes_the_same_experts():
    made = hashed(experts=8, k=2)
    ids = torch.randint(50, (4, 30), generator=torch.Generator().manual_seed(0))
    made.begin(ids)
    routing = made(normal(120, 16))
    by_id: dict[int, set[tuple[int, ...]]] = {}
    for token in range(120):
        taken = tuple(routing.experts[routing.tokens == token].tolist())
        by_id.setdefault(int(ids.flatten()[token]), set()).add(taken)
    assert all(len(found) == 1 for found in by_id.values())
    assert len({next(iter(found)) for found in by_id.values()}) > 15
    assert routing.weights.tolist() == [0.5] * 240
    # in training as in evaluation, whatever the hidden states
    made.eval()
    assert made(normal(120, 16, seed=1)).tokens.equal(routing.tokens)


def test_ids_spread_evenly_over_experts_and_pairs():
    made = hashed(experts=6, k=2)
    made.begin(torch.arange(30_000)[None])
    routing = made(torch.zeros(30_000, 16))
    for count in routing.counts.tolist():
        assert near(count, 30_000, 1 / 3)
    for count in pairs_of(routing, 6).values():
        assert near(count, 30_000, 1 / 15)


def test_switching_a_slot_off_moves_only_its_tokens():
    made = hashed(experts=6, k=1)
    made.begin(torch.arange(600)[None])
    x = torch.zeros(600, 16)

    def owners() -> Tensor:
        routing = made(x)
        return routing.experts[routing.tokens.argsort()]

    before = owners()
    made.active[2] = False
    after = owners()
    assert before[before != 2].equal(after[before != 2])
    assert len(after[before == 2].unique()) == 5


def test_without_ids_of_its_shape_the_input_is_hashed():
    x = normal(40, 16)
    plain = hashed(experts=8, by="input")
    expected = plain(x).tokens
    for ids in (None, torch.zeros(1, 39, dtype=torch.int64)):
        made = hashed(experts=8)
        made.begin(ids)
        assert made(x).tokens.equal(expected)
    plain.begin(torch.zeros(1, 40, dtype=torch.int64))
    assert plain(x).tokens.equal(expected)
    assert plain.flops(10) == 2 * 10 * 16 * 16
    made = hashed(experts=8)
    made.begin(torch.zeros(1, 40, dtype=torch.int64))
    assert made.flops(10) == 0


def test_a_model_hands_its_ids_to_the_layers():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sparing.moefy_(LlamaForCausalLM(config), HashExperts(experts=4)).eval()
    ids = torch.arange(24).view(2, 12)
    taken: list[Tensor] = []
    for layer in expert_layers(model):
        layer.router.register_forward_hook(
            lambda _m, _x, r: taken.append(r.experts[r.tokens.argsort()])
        )
    model(input_ids=ids)
    model.model(ids)
    for first, second in (taken[:2], taken[2:]):
        assert not first.equal(second)  # layers hash differently
    for place, layer in enumerate(expert_layers(model)):
        expected = uniform(ids.flatten(), 4, layer.router.seed).argmax(1)
        assert taken[place].equal(expected)
        assert taken[2 + place].equal(expected)
    # a new id at the end, as in decoding, and a call that has no ids
    model(input_ids=ids[:, :1])
    assert taken[4].equal(uniform(ids[:, 0], 4, expert_layers(model)[0].router.seed).argmax(1))
    model(inputs_embeds=model.get_input_embeddings()(ids))
    assert expert_layers(model)[0].router.ids is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1.5}, "k must be a whole number, got 1.5"),
        ({"k": 9}, r"k must be at most experts \(8\), got 9"),
        ({"by": "id"}, 'by must be "token" or "input", got "id"'),
    ],
)
def test_bad_options_of_hash_say_what_is_wrong(options, message):
    with pytest.raises(RequestError, match=message):
        HashExperts(**options)


# ---- the hash itself -----------------------------------------------------------------------------


def test_mixing_is_splitmix_in_plain_integers():
    def plain(code: int) -> int:
        mask = (1 << 64) - 1
        z = (code + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        return z - (1 << 64) if z >> 63 else z

    codes = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    assert mix(torch.tensor(codes)).tolist() == [plain(c & ((1 << 64) - 1)) for c in codes]
    assert plain(0) & ((1 << 64) - 1) == 0xE220A8397B1DCDAF  # the generator's first from seed 0


def test_numbers_are_uniform_and_belong_to_token_column_and_seed():
    values = uniform(torch.arange(50_000), 3, seed=1)
    assert values.dtype == torch.float32
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    counts = torch.histc(values, 20, 0, 1)
    assert all(near(int(count), 150_000, 1 / 20) for count in counts)
    assert abs(float(torch.corrcoef(values.t())[0, 1])) < 0.02
    other = uniform(torch.arange(50_000), 3, seed=2)
    assert abs(float(torch.corrcoef(torch.stack([values[:, 0], other[:, 0]]))[0, 1])) < 0.02
    assert uniform(torch.tensor([7, 3]), 3, seed=1).equal(values[[7, 3]])


def test_codes_are_the_sides_of_the_planes():
    directions = projection(8, seed=0)
    x = normal(50, 8)
    expected = [sum(1 << b for b in range(16) if float(directions[b] @ row) > 0) for row in x]
    assert sign_codes(x, directions).tolist() == expected
    # scale does not matter, as after a normalisation; direction does
    assert sign_codes(3 * x, directions).tolist() == expected
    assert len(set(expected)) > 40
