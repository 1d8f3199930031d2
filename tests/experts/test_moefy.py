from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
import transformers as hf
from tests.experts.zoo import ZOO, build, inputs
from torch import nn

from sparing.core.errors import RequestError
from sparing.experts.families import feed_forwards
from sparing.experts.layer import ExpertLayer, expert_layers
from sparing.experts.moefy import moefy_
from sparing.experts.top_any import TopAny
from sparing.experts.top_k import TopK

ALL_OPEN = TopK(experts=3, k=3)


def checkpoint_(model: Any) -> None:
    """Switch on activation checkpointing, under the name of this version of transformers."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in expert_layers(model)]


@pytest.mark.parametrize("family", ZOO)
def test_copies_whose_weights_sum_to_one_are_the_dense_model(family: str) -> None:
    model = build(family)
    batch = inputs(model)
    with torch.no_grad():
        dense = model(**batch).logits
        moefy_(model, ALL_OPEN, experts="copy")
        sparse = model(**batch).logits
    assert len(expert_layers(model)) == 2
    assert float(dense.std()) > 0.01
    assert float((sparse - dense).abs().max()) <= 1e-5 * max(1.0, float(dense.abs().max()))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert", "vit"])
def test_the_map_reads_what_the_block_computes(family: str) -> None:
    model = build(family)
    for block in feed_forwards(model):
        weights = block.read()
        assert weights["up"].shape == (48, 32)
        assert weights["down"].shape == (32, 48)
        assert ("gate" in weights) == (block.kind == "gated")
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        whole = block.body(x) if block.rest is None else block.down(block.body(x))
        torch.testing.assert_close(block.dense(x), whole)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("method", [TopAny(max_experts=4), TopK(experts=4, k=2)], ids=["any", "k"])
def test_fresh_experts_train(family: str, method: TopAny | TopK) -> None:
    model = moefy_(build(family), method).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = inputs(model)
    target = torch.tensor([0, 1]) if "pixel_values" in batch else batch["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, -2), target.flatten())
    loss.backward()
    for layer in expert_layers(model):
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        assert layer.experts.up.grad.abs().sum() > 0
        assert layer.router.similarity.grad.abs().sum() > 0
    optimizer.step()
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert any("experts.down" in name for name in moved)


def test_fresh_experts_cost_a_token_about_what_the_block_did() -> None:
    assert expert_layers(moefy_(build("llama"), TopK(experts=4, k=2)))[0].experts.width == 24
    assert expert_layers(moefy_(build("llama"), TopK(experts=4, k=1)))[0].experts.width == 48
    found = expert_layers(moefy_(build("llama"), TopAny(max_experts=8, target_k=3.0)))
    assert found[0].experts.width == 16
    assert expert_layers(moefy_(build("llama"), TopAny(), width=20))[0].experts.width == 20
    assert expert_layers(moefy_(build("llama"), TopAny(width=12)))[0].experts.width == 12


def test_options_of_the_method_are_the_defaults() -> None:
    model = moefy_(build("llama"), TopK(experts=2, k=2, init="copy", where=[1]))
    assert names(model) == ["model.layers.1.mlp"]
    assert expert_layers(model)[0].experts.width == 48


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        ([0, -1], [0, 2]),
        ("model.layers.1.mlp", [1]),
        ("model.layers.2", [2]),
        ("model.layers", [0, 1, 2]),
        ("*.2.mlp", [2]),
        ("model.layers.[01].*", [0, 1]),
        (r"model\.layers\.(0|2)\.mlp", [0, 2]),
        (["model.layers.0.mlp", 2], [0, 2]),
        (lambda name, module: "1" in name and hasattr(module, "gate_proj"), [1]),
    ],
)
def test_where(where: object, expected: list[int]) -> None:
    model = build("llama", num_hidden_layers=3)
    moefy_(model, ALL_OPEN, where=where)  # type: ignore[arg-type]
    assert names(model) == [f"model.layers.{index}.mlp" for index in expected]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("model.layers.1.mpl", r'unknown layer .*did you mean "model\.layers\.1\.mlp"'),
        (["model.layers.0.mlp", "head"], 'unknown layer "head"'),
        (2, "no feed-forward block 2: the model has 2"),
        (-3, "no feed-forward block -3"),
        ([], "names no feed-forward block"),
        (True, "where takes names"),
        ([1.5], "where takes names"),
        ("[", 'unknown layer "\\["'),
        (lambda name, module: False, "chose none"),
    ],
)
def test_a_wrong_where_changes_nothing(where: object, message: str) -> None:
    model = build("llama")
    with pytest.raises(RequestError, match=message):
        moefy_(model, ALL_OPEN, where=where)  # type: ignore[arg-type]
    assert not expert_layers(model)


def test_a_block_is_replaced_once() -> None:
    model = moefy_(build("llama"), ALL_OPEN, where=0)
    with pytest.raises(RequestError, match=r"model\.layers\.0\.mlp is an expert layer already"):
        moefy_(model, ALL_OPEN)
    moefy_(model, TopAny(max_experts=2), where=1)
    assert names(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [s["method"] for s in model.sparing["surgeries"]] == ["top-k", "dynmoe"]
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 1


def test_bad_requests() -> None:
    with pytest.raises(RequestError, match=r"no feed-forward block .*Sequential.*LLaMA.*BERT"):
        moefy_(nn.Sequential(nn.Conv2d(1, 1, 1)), ALL_OPEN)
    with pytest.raises(RequestError, match='"t5"'):
        moefy_(
            hf.T5ForConditionalGeneration(
                hf.T5Config(d_model=8, d_ff=8, num_layers=1, d_kv=4, num_heads=2, vocab_size=9)
            ),
            ALL_OPEN,
        )
    model = build("llama")
    with pytest.raises(RequestError, match='"fresh" or "copy"'):
        moefy_(model, ALL_OPEN, experts="clone")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="has its width 48, got width=24"):
        moefy_(model, ALL_OPEN, experts="copy", width=24)
    with pytest.raises(RequestError, match="at least 1, got 0"):
        moefy_(model, ALL_OPEN, width=0)
    with pytest.raises(RequestError, match="noise"):
        moefy_(model, ALL_OPEN, noise=0.1)
    with pytest.raises(RequestError, match="noise"):
        moefy_(model, ALL_OPEN, experts="copy", noise=-1.0)
    assert not expert_layers(model)
    with pytest.raises(RequestError, match=r"the activation of .* is .*; they have gelu"):
        moefy_(build("llama", hidden_act="mish"), ALL_OPEN)
    biased = build("llama", mlp_bias=True)
    nn.init.ones_(biased.model.layers[1].mlp.gate_proj.bias)
    with pytest.raises(RequestError, match="has a bias"):
        moefy_(biased, ALL_OPEN, experts="copy")
    assert not expert_layers(biased)


def test_a_block_that_computes_something_else_is_found_out() -> None:
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), mlp)
    with pytest.raises(RequestError, match=r"layers\.0\.mlp.* computes something else"):
        moefy_(model, ALL_OPEN)
    moefy_(model, ALL_OPEN, where=1)
    assert names(model) == ["model.layers.1.mlp"]


def test_the_global_generator_is_left_alone_and_the_seed_decides() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (
        moefy_(build("gpt2"), TopAny(max_experts=3), seed=seed) for seed in (1, 1, 2)
    )
    copied = moefy_(build("gpt2"), TopAny(max_experts=3), experts="copy", noise=0.1, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    state, again, different = one.state_dict(), same.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    first = "transformer.h.0.mlp.experts.up"
    assert not torch.equal(state[first], different[first])
    assert not torch.equal(state[first], state[first.replace("h.0", "h.1")])
    up = copied.state_dict()[first]
    dense = build("gpt2").state_dict()["transformer.h.0.mlp.c_fc.weight"].t()
    spread = float((up - dense).std() / dense.std())
    assert 0.09 < spread < 0.11
    assert not torch.equal(up[0], up[1])
    # a layer's start does not depend on which others are replaced
    alone = moefy_(build("gpt2"), TopAny(max_experts=3), where=1, seed=1).state_dict()
    assert torch.equal(alone[first.replace("h.0", "h.1")], state[first.replace("h.0", "h.1")])


def test_dtype_mode_and_dropout_are_kept() -> None:
    model = moefy_(build("gpt2", resid_pdrop=0.25).to(torch.bfloat16), TopAny(max_experts=2))
    layer = model.transformer.h[0].mlp
    assert isinstance(layer, ExpertLayer)
    assert not layer.training
    assert layer.dropout.p == 0.25
    assert layer.experts.up.dtype == torch.bfloat16
    assert layer.router.similarity.dtype == torch.float32  # thresholds move by less than bf16 sees
    assert model(**inputs(model)).logits.isfinite().all()
    trained = moefy_(build("starcoder2", residual_dropout=0.5).train(), TopK(experts=2, k=1))
    assert expert_layers(trained)[0].training
    assert expert_layers(trained)[0].dropout.p == 0.5
    double = build("llama").double()
    batch = inputs(double)
    with torch.no_grad():
        dense = double(**batch).logits
        moefy_(double, ALL_OPEN, experts="copy")
        assert float((double(**batch).logits - dense).abs().max()) < 1e-10


def test_bert_keeps_its_second_half() -> None:
    model = moefy_(build("bert", chunk_size_feed_forward=2), ALL_OPEN, experts="copy")
    layer = model.bert.encoder.layer[0]
    assert isinstance(layer.intermediate, ExpertLayer)
    assert isinstance(layer.output.dense, nn.Identity)
    assert isinstance(layer.output.LayerNorm, nn.LayerNorm)
    assert layer.output.dropout.p == 0.1
    assert not [
        name for name in model.state_dict() if ".output.dense" in name and "attention" not in name
    ]
    layer.intermediate.train()
    model(**inputs(model, rows=2, length=6))
    assert int(layer.intermediate.record.tokens) == 12
    assert len(layer.intermediate.pending) == 1  # one piece, not three


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_gets_no_rows_and_is_in_no_statistic(family: str, dtype: torch.dtype) -> None:
    model = moefy_(build(family), TopAny(max_experts=4, calibration=0)).train()
    batch = inputs(model, rows=2, length=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model(**batch, attention_mask=mask.to(dtype))
    for layer in expert_layers(model):
        assert int(layer.record.tokens) == 10
        assert int(layer.record.k_counts.sum()) == 10
        assert int(layer.record.load.sum()) == int((layer.record.k_counts * torch.arange(5)).sum())


def test_the_mask_is_found_wherever_it_stands() -> None:
    model = moefy_(build("bert"), TopK(experts=2, k=1)).train()
    ids = inputs(model, rows=1, length=4)["input_ids"]
    layer = expert_layers(model)[0]

    def tokens() -> int:
        seen = int(layer.record.tokens)
        layer.record.clear()
        return seen

    mask = torch.tensor([[0, 1, 1, 1]])
    model(ids, mask)
    assert tokens() == 3
    model.bert(ids, mask)  # the body alone
    assert tokens() == 3
    model.bert(input_ids=ids, attention_mask=mask)
    assert tokens() == 3
    model(ids)  # the last mask is forgotten
    assert tokens() == 4
    model(ids, torch.ones(1, 1, 4, 4, dtype=torch.bool))  # says nothing of padding
    assert tokens() == 4


def test_the_mask_of_the_text_is_kept_from_other_towers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = build("llama").model.layers[0].mlp
            self.text = build("llama").model.layers[0].mlp

        def forward(self, image: torch.Tensor, text: torch.Tensor, attention_mask: Any) -> None:
            self.vision_tower(image)
            self.text(text)

    model = moefy_(Both(), TopK(experts=2, k=1)).train()
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    model(torch.ones(1, 4, 32), torch.ones(1, 5, 32), attention_mask=mask)
    assert [int(layer.record.tokens) for layer in expert_layers(model)] == [4, 3]


def test_padded_logits_are_those_of_the_sequence_alone() -> None:
    model = moefy_(build("llama"), TopAny(max_experts=4), noise=0.5, experts="copy")
    ids = inputs(model, rows=1, length=5)["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(8) >= 3).long()[None]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        beside = model(
            input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
        ).logits[:, 3:]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_generation_with_a_cache_equals_generation_without(family: str) -> None:
    dense = build(family, tie_word_embeddings=False)
    model = moefy_(dense, TopAny(max_experts=4), noise=0.5, experts="copy")
    ids = inputs(model, rows=3, length=6)["input_ids"]
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 4)):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    for given in (ids[:1], ids):
        cached, plain = (
            model.generate(
                given,
                attention_mask=mask[: len(given)],
                use_cache=use_cache,
                do_sample=False,
                max_new_tokens=12,
                min_new_tokens=12,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            for use_cache in (True, False)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        assert cached.sequences.shape == (len(given), 18)
        assert len(cached.sequences[:, 6:].unique()) > 2
        torch.testing.assert_close(
            torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_checkpointing_changes_neither_gradients_nor_statistics(family: str) -> None:
    seen = []
    for checkpointing in (False, True):
        model = moefy_(build(family), TopAny(max_experts=4), seed=3)
        if checkpointing:
            checkpoint_(model)
        model.train()
        batch = inputs(model)
        if "input_ids" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, :3] = 0
        with torch.random.fork_rng():
            torch.manual_seed(7)
            for _ in range(2):
                model(**batch).logits.square().mean().backward()
        layers = expert_layers(model)
        seen.append(
            (
                [p.grad for p in model.parameters() if p.grad is not None],
                [
                    value
                    for layer in layers
                    for value in vars(layer.record).values()
                    if isinstance(value, torch.Tensor)
                ],
                [layer.record.costs.tolist() for layer in layers],
                [buffer for layer in layers for buffer in layer.buffers()],
            )
        )
    (grads, records, spent, buffers), (grads2, records2, spent2, buffers2) = seen
    assert spent == spent2
    assert spent[0][1] > 0
    assert len(grads) == len(grads2) > 10
    assert all(torch.equal(a, b) for a, b in zip(records, records2, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, buffers2, strict=True))
    for a, b in zip(grads, grads2, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_are_whole_and_apart(again: object) -> None:
    model = moefy_(build("llama"), TopAny(max_experts=4))
    batch = inputs(model)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 0] = 0
    model.train()(**batch).logits.sum()  # leaves losses with a graph behind
    model.eval()
    twin = again(model)  # type: ignore[operator]
    assert twin.sparing == model.sparing
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, model(**batch).logits)
    assert expert_layers(model)[0].mask is not None
    before = expert_layers(model)[0].mask
    twin(input_ids=batch["input_ids"][:1])
    assert expert_layers(twin)[0].mask is None
    assert expert_layers(model)[0].mask is before


def test_any_model_of_known_blocks_works() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act = nn.Linear(8, 16), nn.GELU()
            self.drop1, self.norm = nn.Dropout(0.0), nn.Identity()
            self.fc2, self.drop2 = nn.Linear(16, 8), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.norm(self.drop1(self.act(self.fc1(x))))
            return self.drop2(self.fc2(hidden))

    mlp = Mlp()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 8), mlp), "b": mlp, "c": Mlp()}).eval()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    dense = model["b"](x)
    model["c"].drop1.p = 0.2
    with pytest.raises(RequestError, match=r"drops hidden units with probability 0\.2"):
        moefy_(model, ALL_OPEN)
    moefy_(model, ALL_OPEN, experts="copy", where="a.1")
    assert model["a"][1] is model["b"]  # one block in two places stays one
    assert model["b"].dropout.p == 0.1
    torch.testing.assert_close(model["b"](x), dense)
