from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.errors import RequestError, RunError
from sparing.weights.masks import masks
from sparing.weights.scores import synflow
from sparing.weights.scores.linearised import linearised


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return module


def call(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).sum()


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


def test_a_network_of_relus_gets_the_sum_over_its_paths():
    model = seeded(
        nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    )
    model.double()
    found = synflow(model, matrices(model), [-torch.rand(7, 4)], call)
    first, last = model[0].weight.detach().abs(), model[2].weight.detach().abs()
    paths = last[:, :, None] * first[None]  # (2, 3, 4), one flow for each of the 7 rows
    torch.testing.assert_close(found["0.weight"], 7 * paths.sum(0))
    torch.testing.assert_close(found["2.weight"], 7 * paths.sum(2))


def test_the_data_does_not_matter_only_its_shape():
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    found = [
        synflow(model, matrices(model), [batch], call)
        for batch in (torch.zeros(5, 4), torch.full((5, 4), -3.0))
    ]
    assert all(found[0][n].equal(found[1][n]) for n in found[0])


def test_buffers_are_left_alone_and_whole_numbers_are_not_taken_for_weights():
    # the trap: the state is made positive as a whole, integers and masks with it
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False)
            self.register_buffer("order", torch.tensor([2, 0, 1]))
            self.register_buffer("offset", torch.tensor(-2))
            self.register_buffer("sign", torch.tensor([-1.0, 1.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            assert int(self.offset) == -2
            assert self.sign.tolist() == [1, 1, 1]
            return self.linear(x)[:, self.order] * self.sign

    model = seeded(Counted())
    found = synflow(model, matrices(model), [torch.ones(1, 3)], call)
    torch.testing.assert_close(found["linear.weight"], model.linear.weight.detach().abs())
    assert model.sign.tolist() == [-1, 1, 1]


class Norms(nn.Module):
    """Every normalisation and many activations in a row; only the matrices have a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
        self.steps = nn.ModuleList(
            [
                nn.Sequential(nn.LayerNorm(8, bias=False), nn.GELU()),
                nn.Sequential(nn.RMSNorm(8), nn.SiLU()),
                nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Tanh()),
                nn.Sequential(nn.GroupNorm(2, 8, affine=False), nn.ELU()),
                nn.Softmax(-1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for linear, step in zip(self.inner, self.steps, strict=True):
            x = step(linear(x))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))
        return F.normalize(x, dim=-1)


def test_the_flow_is_conserved_through_norms_and_activations():
    # Tanaka et al. 2020, theorem: what a layer's scores sum to is the whole flow, in every layer
    model = seeded(Norms()).double()
    found = synflow(model, matrices(model), [torch.rand(4, 8)], call)
    sums = [float(score.sum()) for score in found.values()]
    assert len(sums) == 5
    assert sums == pytest.approx([sums[0]] * 5, rel=1e-9)
    assert sums[0] > 0
    assert all(bool((score > 0).all()) for score in found.values())


class Attention(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        size = x.shape[-2]
        angles = torch.arange(size, device=x.device).to(x.dtype)[:, None] / torch.arange(1, 9)
        q, k = (
            p * angles.cos() + torch.cat((-p[..., 4:], p[..., :4]), -1) * angles.sin()
            for p in (q, k)
        )
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(-2, -3) for p in (q, k, v))
        hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
        if self.how == "written out":
            scores = q @ k.transpose(-2, -1) / math.sqrt(4)
            mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        elif self.how == "float mask":
            mask = torch.zeros(size, size, dtype=x.dtype).masked_fill(hidden, -math.inf)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.how == "bool mask":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(-2, -3).flatten(-2))


def test_queries_keys_values_and_outputs_have_the_same_flow():
    found = {}
    for how in ("written out", "float mask", "bool mask", "causal"):
        model = seeded(Attention(how)).double()
        found[how] = synflow(model, matrices(model), [torch.rand(2, 5, 8)], call)
        sums = [float(score.sum()) for score in found[how].values()]
        assert sums == pytest.approx([sums[0]] * 4, rel=1e-9)
        assert sums[0] > 0
    for how in found:
        for name, score in found["written out"].items():
            torch.testing.assert_close(found[how][name], score)


def test_grouped_heads_flow_as_repeated_ones():
    q, k, v = torch.rand(1, 4, 3, 2), torch.rand(1, 2, 3, 2), torch.rand(1, 2, 3, 2)
    model = nn.Identity()
    with linearised(model):
        grouped = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    repeated = [p.repeat_interleave(2, 1) for p in (k, v)]
    torch.testing.assert_close(grouped, F.scaled_dot_product_attention(q, *repeated))


def families() -> dict[str, Any]:
    import transformers as hf

    small: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 24,
    }  # fmt: skip
    text = {**small, "vocab_size": 50}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**text)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**text, num_key_value_heads=2, **ends)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, **ends)
        ),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**small, image_size=8, patch_size=4)
        ),
    }


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_it_flows_through_real_networks_without_data(family):
    model = families()[family]().train()
    named = {
        n: p for n, p in model.named_parameters() if p.ndim > 1 and (".layer" in n or ".h." in n)
    }
    assert len(named) >= 8
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    found = synflow(model, named)
    sums = {n: float(s.sum()) for n, s in found.items()}
    assert all(s > 0 for s in sums.values()), sums
    if family == "gpt2":  # whose GELU is written out with tanh, and whose biases begin at zero
        assert sums["transformer.h.0.mlp.c_fc.weight"] == pytest.approx(
            sums["transformer.h.0.mlp.c_proj.weight"], rel=1e-5
        )
    else:  # in GPT-2 queries, keys and values are one matrix
        words = ("query", "key", "value") if family == "bert" else ("q_proj", "k_proj", "v_proj")
        same = [s for n, s in sums.items() if any(w in n for w in words)]
        # biases and positions flow beside what is conserved
        assert same[:3] == pytest.approx([same[0]] * 3, rel=0.1)
    assert all(model.state_dict()[n].equal(p) for n, p in before.items())
    assert model.training
    assert torch.get_rng_state().equal(state)
    kept = masks(synflow(model, named, keep=0.1, steps=4), 0.1)
    total = sum(p.numel() for p in named.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.1 * total)


def test_tokens_and_their_number_do_not_matter_to_an_encoder():
    model = families()["bert"]()
    named = {n: p for n, p in model.named_parameters() if "query.weight" in n}

    def of_mapping(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    ids = torch.tensor([[3, 4, 5, 6]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": ids[:, 0] % 2,
    }
    first = synflow(model, named, [batch], of_mapping)
    second = synflow(model, named, [{**batch, "input_ids": ids + 9}], of_mapping)
    without = synflow(model, named, [{**batch, "attention_mask": torch.ones(1, 4)}], of_mapping)
    for n in named:
        assert first[n].equal(second[n])
        torch.testing.assert_close(first[n], without[n])


def test_steps_against_the_collapse_of_a_layer():
    # a wide layer next to a narrow one: taken once, the wide one's small scores all fall
    model = seeded(
        nn.Sequential(
            nn.Linear(60, 60, bias=False),
            nn.Linear(60, 2, bias=False),
            nn.Linear(2, 60, bias=False),
        )
    )
    named, batch = matrices(model), [torch.ones(1, 60)]
    # 60 entries are enough for a path through every layer
    once = masks(synflow(model, named, batch, call), 60 / 3840)
    steps = masks(synflow(model, named, batch, call, keep=60 / 3840, steps=60), 60 / 3840)
    assert sum(int(m.sum()) for m in once.values()) == 60
    assert sum(int(m.sum()) for m in steps.values()) == 60
    assert not all(bool(m.any()) for m in once.values())
    assert all(bool(m.any()) for m in steps.values())


def test_wrong_requests_are_refused():
    model = seeded(nn.Sequential(nn.Linear(4, 3)))
    named = matrices(model)
    with pytest.raises(RequestError, match="does not tell it by dummy_inputs"):
        synflow(model, named)
    with pytest.raises(RequestError, match="without a loss"):
        synflow(model, named, [torch.ones(1, 4)])
    with pytest.raises(RequestError, match="did not call the model"):
        synflow(model, named, [torch.ones(1, 4)], lambda model, batch: batch.sum())
    other = nn.ModuleDict({"used": model, "other": nn.Linear(2, 2)})
    other.forward = lambda x: model(x)
    with pytest.raises(RequestError, match="output depends on none"):
        synflow(other, {"w": other["other"].weight}, [torch.ones(1, 4)], call)

    class Negative(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0.0

    broken = Negative(4, 3)
    with pytest.raises(RunError, match="flow through the network is inf"):
        synflow(broken, matrices(broken), [torch.ones(1, 4)], call)


def test_an_adapter_is_scored_by_the_shape_of_one_sample():
    from models import batch, bert

    from sparing.weights import installed
    from sparing.weights.adapters import SparseAdapter, adapt_

    rows = []

    def loss(model, given):
        rows.append(len(given["labels"]))
        return model(**given).loss

    def kept(data):
        model = bert()
        adapt_(model, SparseAdapter(score="synflow", width=4, keep=0.5), data=data, loss=loss)
        parts = installed.parts(model, "default").values()
        return [factor.mask() for part in parts for _, factor in part.named_factors()]

    whole = batch(bert(), rows=7)
    first = {key: value[:1] for key, value in whole.items()}
    for one, other in zip(kept([whole]), kept([first]), strict=True):
        assert one.equal(other)
    assert set(rows) == {1}
    # what has no samples is taken as it is
    odd = {**whole, "scale": torch.ones(3)}
    rows.clear()

    def of_odd(model, given):
        rows.append(len(given["labels"]))
        return model(input_ids=given["input_ids"]).logits.sum()

    method = SparseAdapter(score="synflow", width=4, keep=0.5)
    adapt_(bert(), method, data=[odd], loss=of_odd)
    assert set(rows) == {7}
