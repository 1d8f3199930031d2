"""Importance, gates, scales and biases against plain references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.convert.dense import STORIES, load, logits, saved
from tests.experts.zoo import build, inputs
from torch import Tensor

from sparing.convert import Conversion, activations, convert, fitting, simulating, to_dense
from sparing.convert.deciding import from_model, scores_of
from sparing.convert.reading import in_batches, packed, texts_of, written
from sparing.convert.skeleton import skeleton
from sparing.core.errors import RequestError
from sparing.experts.families import feed_forwards


def batches(model: torch.nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    made = [inputs(model, rows=4, length=8, seed=seed) for seed in range(count)]
    return [{**batch, "labels": batch["input_ids"]} for batch in made]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_importance_is_the_mean_of_h_times_its_gradient(name: str):
    """By hidden units of one block at a time, as plain as it can be written."""
    model = build(name)
    blocks = feed_forwards(model)
    read = batches(model)
    labels = [torch.tensor([0, 1, 1, 0])] * 3
    found = activations.importance(model, blocks, read, labels, 2)
    for position, block in enumerate(blocks):
        held: list[Tensor] = []

        def keep(module: object, args: tuple[Tensor], held: list[Tensor] = held) -> None:
            args[0].retain_grad()
            held.append(args[0])

        handle = block.down.register_forward_pre_hook(keep)
        expected = torch.zeros(2, block.width, dtype=torch.float64)
        for batch in read:
            model(**batch).loss.backward()
            h = held.pop()
            score = (h.detach() * h.grad).abs().double()
            expected[0] += score[[0, 3]].sum((0, 1))
            expected[1] += score[[1, 2]].sum((0, 1))
        handle.remove()
        expected /= 3 * 2 * 8
        torch.testing.assert_close(found[position], expected, rtol=1e-4, atol=1e-9)
    model.zero_grad()
    activations.importance(model, blocks, read, labels, 2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_padding_is_not_looked_at():
    model = build("llama")
    blocks = feed_forwards(model)
    ids = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(3))
    plain = [{"input_ids": ids, "labels": ids}]
    pad = torch.zeros(4, 3, dtype=torch.int64)
    padded = [
        {
            "input_ids": torch.cat([ids, pad], 1),
            "labels": torch.cat([ids, pad - 100], 1),
            "attention_mask": torch.cat([torch.ones_like(ids), pad], 1),
        }
    ]
    labels = [torch.tensor([0, 1, 1, 0])]
    for look in (
        lambda read: activations.importance(model, blocks, read, labels, 2),
        lambda read: activations.inputs_of(model, blocks, read, 24),
        lambda read: [activations.text_vectors(model, blocks, read)],
        lambda read: activations.coactivation(model, blocks, read, 0),
    ):
        for one, other in zip(look(plain), look(padded), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_every_sequence_is_in_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The published clustering loses one text of each full batch of 33."""
    path = saved(tmp_path, "llama")
    model = load(path)
    read = batches(model, 9)
    seen: list[Tensor] = []
    importance = activations.importance

    def spied(*args: Any, **more: Any) -> list[Tensor]:
        seen.extend(args[3])
        return importance(*args, **more)

    monkeypatch.setattr(activations, "importance", spied)
    wanted = Conversion(experts=4, active=2, method="gradient")
    scores = scores_of(model, feed_forwards(model), read, wanted, lambda *told: None)
    assert [len(labels) for labels in seen] == [4] * 9
    assert torch.bincount(torch.cat(seen)).tolist() == [9] * 4
    assert scores is not None


def test_coactivation_sketches_keep_products():
    model = build("llama")
    blocks = feed_forwards(model)
    read = batches(model, 8)
    hidden: list[Tensor] = []
    with (
        activations.hooked(blocks[:1], lambda i, h: hidden.append(h.abs().double())),
        torch.no_grad(),
    ):
        for batch in read:
            model(**batch)
    every = torch.cat(hidden)
    found = activations.coactivation(model, blocks, read, seed=0)[0]
    exact = F.normalize(every.t(), dim=1) @ F.normalize(every.t(), dim=1).t()
    near = F.normalize(found, dim=1) @ F.normalize(found, dim=1).t()
    assert float((exact - near).abs().mean()) < 0.1


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bert")]


@pytest.mark.parametrize("name", ["llama", *SLOW])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "random", "scale": "published"},
        {"method": "gradient", "residual": 1, "active": 2, "gate": "zero"},
        {"method": "sharing-inner", "gate": "centroids"},
        {"method": "sharing-inter", "clusters": "tokens"},
        {"method": "coactivation", "compensate": "mean"},
        {"method": "groups", "compensate": "fitted", "scale": "learned", "learn_steps": 2},
        {"method": "sharing-inner", "refit": True, "residual": 1, "active": 2},
        {"method": "coactivation", "refit": True, "compensate": "mean", "experts": 3},
    ],
)
def test_the_simulation_is_the_converted_model(
    name: str, options: dict[str, object], tmp_path: Path
):
    path, out = saved(tmp_path, name), tmp_path / "out"
    model = load(path)
    wanted = Conversion(**{"experts": 4, "active": 2, **options})  # type: ignore[arg-type]
    read = batches(model)
    made = convert(path, out, wanted, batches=read)
    assert made.checked.once in (True, None)
    dense = skeleton(path)
    blocks = feed_forwards(model)
    decisions = from_model(dense, model, blocks, read, wanted)
    batch = inputs(model, seed=7)
    with simulating.converted(blocks, decisions, fitting.softmax_top_k(wanted.chosen)):
        expected = logits(model, batch)
    torch.testing.assert_close(logits(load(out), batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"method": method}
        for method in ("random", "contiguous", "kmeans", "kmeans-cosine", "groups", "coactivation")
    ]
    + [
        {"method": "gradient"},
        {"method": "gradient", "clusters": "tokens", "residual": 1, "active": 3},
        {"method": "sharing-inter", "active": 3},
    ],
)
def test_each_method_that_partitions_has_an_exact_way_back(
    options: dict[str, object], tmp_path: Path
):
    """Of experts that do not divide the width, with a scale that is a power of two."""
    path, out, back = saved(tmp_path, "llama"), tmp_path / "out", tmp_path / "back"
    model = load(path)
    fixed: dict[str, object] = {"experts": 5, "active": 2, "gate": "random", "scale": 2.0}
    wanted = Conversion(**{**fixed, **options})  # type: ignore[arg-type]
    made = convert(path, out, wanted, batches=batches(model))
    assert made.checked.once is True
    assert to_dense(out, back).exact
    again = load(back).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def planted(tokens: int = 400) -> fitting.Sample:
    """Four experts of which the sign of two inputs decides the two that matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 6, generator=generator)
    outputs = torch.randn(4, tokens, 5, generator=generator)
    small = torch.full((tokens, 4), 0.05)
    matter = small.scatter(1, (x[:, :1] > 0).long(), 1.0).scatter(
        1, 2 + (x[:, 1:2] > 0).long(), 1.0
    )
    outputs = outputs * matter.t()[:, :, None]
    return fitting.Sample(x=x, outputs=outputs, target=outputs.sum(0))


def distance(found: fitting.Sample, weights: Tensor, scale: float) -> float:
    y = scale * torch.einsum("te,etd->td", weights, found.outputs)
    return float((y - found.target).square().sum() / found.target.square().sum())


def test_a_distilled_gate_finds_the_experts_that_matter():
    found = planted()
    gate = fitting.distilled(found, 2, torch.Generator().manual_seed(1))
    weights = fitting.softmax_top_k(2)(found.x, gate)
    scale = fitting.calibrated(found, weights)
    # the two that were planted; a greedy choice without exchanges names other ones for 7 % of
    # them, and so does any choice by what is left: where the two outputs nearly cancel
    x = found.x
    planted_ = torch.stack([x[:, 0] <= 0, x[:, 0] > 0, x[:, 1] <= 0, x[:, 1] > 0], 1)
    assert float(((weights > 0) & planted_).sum() / planted_.sum()) > 0.9
    random = fitting.softmax_top_k(2)(found.x, torch.randn(4, 6, generator=torch.Generator()))
    worse = distance(found, random, fitting.calibrated(found, random))
    assert distance(found, weights, scale) < 0.1 * worse


def test_one_expert_of_weight_1_leaves_the_gate_untrained_and_switch_weights_do_not(tmp_path: Path):
    path = saved(tmp_path, "llama")
    for normalize in (True, False):
        out = tmp_path / str(normalize)
        options = {} if normalize else {"normalize": False}
        wanted = Conversion(
            experts=4, active=1, form="sparing", scale="calibrated", router_options=options
        )
        convert(path, out, wanted, batches=batches(load(path)))
        told = "does not train the gate" in (out / "README.md").read_text()
        assert told is normalize is wanted.routed_by_one
        model = load(out).train()
        batch = inputs(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradient = float(model.model.layers[0].mlp.router.similarity.grad.abs().max())
        assert gradient < 1e-7 if normalize else gradient > 1e-5  # s / s has rounding in it


def test_the_calibrated_scale_is_the_best_one():
    found = planted()
    weights = fitting.softmax_top_k(2)(found.x, torch.zeros(4, 6))
    scale = fitting.calibrated(found, weights)
    here = distance(found, weights, scale)
    assert here < min(distance(found, weights, scale * s) for s in (0.99, 1.01))


def test_the_best_choice_is_near_that_of_all_choices():
    import itertools

    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(5, 30, 7, generator=generator)
    found = fitting.Sample(x=torch.zeros(30, 2), outputs=outputs, target=outputs.sum(0))
    greedy = fitting.best_choice(found, 2)
    assert greedy.sum(1).tolist() == [2] * 30
    left = []
    for pair in itertools.combinations(range(5), 2):
        left.append((found.target - outputs[list(pair)].sum(0)).square().sum(1))
    best = torch.stack(left).min(0).values
    mine = (found.target - torch.einsum("te,etd->td", greedy.float(), outputs)).square().sum(1)
    assert bool((mine >= best - 1e-4).all())
    assert float((mine / best).mean()) < 1.025  # greedy alone: 1.032


def test_mean_biases_add_what_is_missing_where_weights_are_even():
    found = planted()
    weights = torch.zeros(400, 4)
    weights[:200, :2] = 0.5
    weights[200:, 1:3] = 0.5
    bias = fitting.mean_biases(found, weights)
    means = [found.outputs[e][weights[:, e] == 0].mean(0) for e in (0, 2, 3)]
    # expert 1 is always chosen and never missing
    torch.testing.assert_close(weights[0] @ bias, means[1] + means[2])
    torch.testing.assert_close(weights[300] @ bias, means[0] + means[2])


def test_fitted_biases_come_nearer_than_any_others():
    found = planted()
    weights = fitting.softmax_top_k(2)(found.x, torch.randn(4, 6, generator=torch.Generator()))
    bias = fitting.fitted_biases(found, weights, 2.0)

    def far(b: Tensor) -> float:
        y = 2.0 * torch.einsum("te,etd->td", weights, found.outputs) + weights @ b
        return float((y - found.target).square().sum())

    assert far(bias) < far(torch.zeros_like(bias))
    for row in range(4):
        moved = bias.clone()
        moved[row] += 0.05
        assert far(bias) < far(moved)


def test_the_unbiased_scale_has_the_dense_output_as_its_mean():
    """The published n/k gives a k-th of it: each of k chosen experts has weight 1/k on average."""
    found = planted(50)
    choices = [torch.zeros(50, 4).index_fill(1, torch.tensor(p), 0.5) for p in
               ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3])]  # fmt: skip
    mean = torch.stack([torch.einsum("te,etd->td", w, found.outputs) for w in choices]).mean(0)
    options = Conversion(experts=4, active=2)
    from sparing.convert.options import plain_scale

    unbiased, published = (plain_scale(rule, options) for rule in ("unbiased", "published"))
    torch.testing.assert_close(mean * unbiased, found.target)
    torch.testing.assert_close(mean * published, found.target / 2)


def test_a_zero_gate_chooses_the_same_experts_for_all_tokens():
    """As published, where training adds noise; so it is not the default."""
    weights = fitting.softmax_top_k(2)(torch.randn(9, 6), torch.zeros(8, 6))
    assert bool((weights > 0).all(0).sum() == 2)
    assert Conversion().resolved_gate(False) == "random"


def test_texts_are_read_and_their_errors_name_file_and_line(tmp_path: Path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    plain = tmp_path / "plain.txt"
    plain.write_text("three")
    assert texts_of([good, plain]) == ["one", "two", "three"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"txt": 2}\n')
    with pytest.raises(RequestError, match=r"bad\.jsonl, line 2"):
        texts_of([bad])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(RequestError, match="is empty"):
        texts_of([tmp_path / "empty.txt"])
    with pytest.raises(RequestError, match="cannot be read"):
        texts_of([tmp_path / "none.txt"])


def test_packing_cuts_sequences_of_one_length():
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    found = packed(["abcde", "fghij"], tokenizer, 2, 4)
    assert found[0]["input_ids"].tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    for length, rows in ((8, 4), (256, 4), (512, 2), (2048, 1)):
        made = in_batches(torch.zeros(5, length, dtype=torch.int64))
        assert len(made[0]["labels"]) == rows
        assert sum(len(batch["input_ids"]) for batch in made) == 5
    with pytest.raises(RequestError, match="two tokens"):
        packed(["a"], tokenizer, 2, 4)


def test_what_a_model_writes_follows_its_seed_and_no_global_one():
    model = build("llama")
    state = torch.get_rng_state()
    a, b, c = (written(model, 3, 6, seed)[0]["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (3, 6)
    with pytest.raises(RequestError, match="writes no text"):
        written(build("bert"), 3, 6, 0)


def test_too_few_texts_for_the_clusters(tmp_path: Path):
    path = saved(tmp_path, "llama")
    wanted = Conversion(experts=4, active=2, method="gradient", sequences=2, length=8)
    with pytest.raises(RequestError, match="2 texts cannot make 4 clusters"):
        convert(path, tmp_path / "out", wanted)


def test_texts_are_clustered_by_a_sentence_encoder(tmp_path: Path):
    """Its vectors are the mean of its last states over real tokens; errors say what is missing."""
    from transformers import AutoTokenizer

    from sparing.convert.encoding import sentence_vectors

    encoder = saved(tmp_path, "bert", vocab_size=512)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(encoder)
    own = AutoTokenizer.from_pretrained(STORIES)
    texts = ["Once upon a time, there was a little girl.", "One day, a big red ball fell."]
    read = packed(texts * 4, own, 8, 12)
    found = sentence_vectors(encoder, STORIES, read)
    assert found.shape == (len(torch.cat([b["input_ids"] for b in read])), 32)
    words = own.batch_decode(read[0]["input_ids"][:1], skip_special_tokens=True)
    from transformers import AutoModel

    network = AutoModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        alone = network(**own(words, return_tensors="pt")).last_hidden_state.mean(1)
    torch.testing.assert_close(found[:1], F.normalize(alone), rtol=1e-4, atol=1e-5)

    wanted = Conversion(experts=2, active=1, method="gradient", encoder=str(encoder), gate="zero")
    made = convert(STORIES, tmp_path / "out", wanted, batches=read)
    assert made.checked.once
    plain = convert(
        STORIES, tmp_path / "own", Conversion(experts=2, active=1, method="gradient"), batches=read
    )
    assert plain.checked.once
    with pytest.raises(RequestError, match="has no tokenizer"):
        sentence_vectors(saved(tmp_path / "bare", "bert"), STORIES, read)
    with pytest.raises(RequestError, match="methods by importance"):
        Conversion(method="random", encoder=str(encoder))
