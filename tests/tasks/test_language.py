from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sparing.core.errors import RequestError
from sparing.core.task import Task
from sparing.tasks.language import Language, LanguageOptions, corpus

SMALL: dict[str, Any] = {
    "domains": ("shakespeare", "gsm8k"),
    "seq_len": 32,
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "width": 24,
    "eval_windows": 5,
    "eval_batch": 2,
    "sample_bytes": 12,
    "passage_bytes": 40,
}


@pytest.fixture(scope="module")
def task() -> Language:
    task = Language(**SMALL)
    task.prepare(0)
    return task


@pytest.fixture(scope="module")
def model(task: Language) -> nn.Module:
    return task.model(3)


def test_is_a_task(task: Language) -> None:
    assert isinstance(task, Task)
    assert task.domains == ("shakespeare", "gsm8k")
    assert task.tokens_per_sample == 32
    assert task.fingerprint == corpus.fingerprint(corpus.load(task.domains))


def test_all_domains_load_and_the_hash_ignores_seed_and_shape() -> None:
    one, other = Language(), Language(seq_len=64)
    one.prepare(0)
    other.prepare(7)
    assert one.domains == ("shakespeare", "gsm8k", "python")
    assert one.fingerprint == other.fingerprint
    order = one.order(0, torch.Generator().manual_seed(1))
    assert len(set(order.tolist())) == len(order) == 3 * 3921
    assert torch.bincount(one.domain_of(order[:300])).tolist() == [100, 100, 100]
    inputs = one.train.batch(order[:8])["input_ids"]
    assert inputs.shape == (8, 256)
    assert int(inputs.min()) >= 0
    assert int(inputs.max()) < 256


def test_order_reads_only_the_generators_seed(task: Language) -> None:
    generator = torch.Generator().manual_seed(5)
    first = task.order(1, generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    torch.rand(3, generator=generator)
    restored = torch.Generator()
    restored.set_state(generator.get_state())
    assert torch.equal(first, task.order(1, generator))
    assert torch.equal(first, task.order(1, restored))
    assert not torch.equal(first, task.order(1, torch.Generator().manual_seed(6)))


def test_model_has_the_shape_asked_for_and_leaves_generators(task: Language) -> None:
    before = torch.get_rng_state()
    one, same, other = task.model(1), task.model(1), task.model(2)
    assert torch.equal(before, torch.get_rng_state())
    config: Any = one.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (256, 16, 24)
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 2)
    assert type(one).__name__ == "LlamaForCausalLM"
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_losses_are_the_models_own_loss_per_sample(task: Language, model: nn.Module) -> None:
    batch = task.train.batch(torch.tensor([0, 5, len(task.train) - 1]))
    losses, outputs = task.losses(model, batch)
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    assert outputs.logits.shape == (3, 32, 256)
    assert outputs.past_key_values is None
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        # Hugging Face shifts labels itself: give it the whole window, with a last byte as input.
        window = torch.cat([one["input_ids"], one["labels"][:, -1:]], dim=1)
        own = model(input_ids=window, labels=window, use_cache=False).loss
        torch.testing.assert_close(losses[row], own, rtol=1e-5, atol=1e-6)
    losses.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad(set_to_none=True)


def test_losses_are_float32_under_autocast(task: Language, model: nn.Module) -> None:
    batch = task.train.batch(torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = task.losses(model, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, task.losses(model, batch)[0], rtol=0.02, atol=0.0)


class Uniform(nn.Module):
    """All bytes equally likely but, by a chosen margin, the space."""

    def __init__(self, space: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(256))
        with torch.no_grad():
            self.bias[32] = space

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        class Outputs:
            logits = self.bias.expand(*input_ids.shape, 256)

        return Outputs()


def test_evaluate_scores_the_held_out_windows(task: Language) -> None:
    flat = task.evaluate(Uniform())
    assert flat == pytest.approx(dict.fromkeys(flat, 8.0), rel=1e-6)
    assert set(flat) == {
        "bits_per_byte",
        "bits_per_byte/shakespeare",
        "bits_per_byte/gsm8k",
    }
    margin = 3.0
    scores = task.evaluate(Uniform(margin))
    total = math.log2(255 + math.exp(margin))
    for name in task.domains:
        text = corpus.DOMAINS[name]().held_out
        windows = (len(text) - 1) // 32
        labels = b"".join(
            text[start + 1 : start + 33] for start in (32 * (i * windows // 5) for i in range(5))
        )
        expected = total - margin / math.log(2) * labels.count(b" ") / len(labels)
        assert scores[f"bits_per_byte/{name}"] == pytest.approx(expected, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(
        sum(scores[f"bits_per_byte/{name}"] for name in task.domains) / 2
    )


def test_evaluate_and_page_leave_modes_gradients_and_generators(task: Language) -> None:
    model: Any = task.model(0)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    first = task.evaluate(model)
    page = task.page(model, 1)
    assert task.evaluate(model) == first
    assert task.page(model, 1) == page
    assert task.page(model, 2)["samples"] != page["samples"]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    task.losses(model, task.train.batch(torch.arange(2)))[0].mean().backward()


def test_page_shows_held_out_text_of_every_domain(task: Language, model: nn.Module) -> None:
    page = task.page(model, 0)
    assert [s["domain"] for s in page["samples"]] == list(task.domains)
    assert [p["domain"] for p in page["passages"]] == list(task.domains)
    for shown, passage in zip(page["samples"], page["passages"], strict=True):
        held_out = corpus.DOMAINS[shown["domain"]]().held_out
        assert shown["prompt"].encode() in held_out
        assert len(shown["prompt"]) == 8
        assert len(passage["bytes"]) == 40
        assert bytes(passage["bytes"]) in held_out


def test_reading_a_passage_goes_in_pieces_that_the_model_was_trained_on(task: Language) -> None:
    model: Any = task.model(0)
    seen: list[torch.Tensor] = []
    modes: list[bool] = []

    def look(module: nn.Module, _: Any, given: dict[str, Any]) -> None:
        seen.append(given["input_ids"])
        modes.append(module.training)

    model.register_forward_pre_hook(look, with_kwargs=True)
    passage = task.page(model, 0)["passages"][1]
    seen.clear()
    modes.clear()
    model.train()
    task.read(model, passage)
    assert [piece.shape for piece in seen] == [(1, 32), (1, 8)]
    assert torch.cat(seen, dim=1).tolist() == [passage["bytes"]]
    assert modes == [False, False]
    assert model.training


def test_sampling_with_a_cache_draws_the_likely_byte(task: Language) -> None:
    from sparing.tasks.language.sample import sample

    model: Any = task.model(0)
    prompt = torch.tensor([list(b"To be, or"), list(b"If x = 3 ")])
    # Near temperature 0 sampling is greedy: compare with decoding without a cache.
    drawn = sample(model, prompt, 10, seed=0, temperature=1e-6)
    grown = prompt
    with torch.no_grad():
        for _ in range(10):
            following = model(input_ids=grown, use_cache=False).logits[:, -1].argmax(-1)
            grown = torch.cat([grown, following.unsqueeze(1)], dim=1)
    assert torch.equal(drawn, grown[:, 9:])


def test_references_are_scored_on_the_evaluated_windows(
    task: Language, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from sparing.tasks.language import reference

    asked: list[Any] = []

    def measure(texts: Any, starts: Any, length: int) -> reference.Scores:
        asked.append((texts, starts, length))
        return {"xz": {"shakespeare": 2.0, "gsm8k": 1.0, "mean": 1.5}}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reference, "measure", measure)
    assert task.references()["xz"]["mean"] == 1.5
    ((texts, starts, length),) = asked
    assert list(texts) == list(task.domains)
    assert length == 32
    assert len(starts["gsm8k"]) == 5
    assert starts["gsm8k"][0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"seq_len": "256"}, "seq_len must be a whole number"),
        ({"seq_len": True}, "seq_len must be a whole number"),
        ({"vocab": 128}, "vocab 128 does not fit"),
        ({"vocab": 50257}, "vocab 50257 does not fit"),
        ({"dim": 130, "heads": 4}, "dim 130 must be a multiple of heads 4"),
        ({"dim": 12, "heads": 4}, "must be even"),
        ({"heads": 4, "kv_heads": 3}, "must be a multiple of kv_heads 3"),
        ({"kv_heads": 0}, "kv_heads must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"eval_windows": 0}, "eval_windows must be at least 1"),
        ({"init_std": 0.0}, "init_std must be a positive number"),
        ({"rope_theta": math.nan}, "rope_theta must be a positive number"),
        ({"domains": []}, "domains is empty"),
        ({"domains": ["gsm8k", "gsm8k"]}, "names one twice"),
        ({"domains": ["pyton"]}, 'did you mean "python"'),
        ({"sequence": 3}, 'no option "sequence"'),
        ({"seq_length": 3}, 'did you mean "seq_len"'),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Language(**options)


def test_the_development_split_is_other_data() -> None:
    kinds = {}
    for split in ("final", "development"):
        task = Language(split=split, domains="shakespeare", eval_windows=2)
        task.prepare(0)
        kinds[split] = task
    assert kinds["final"].fingerprint != kinds["development"].fingerprint
    assert len(kinds["development"].train) < len(kinds["final"].train)


def test_options_take_lists_and_single_names() -> None:
    listed: Any = ["gsm8k", "python"]
    single: Any = "python"
    assert LanguageOptions(domains=listed).domains == ("gsm8k", "python")
    assert LanguageOptions(domains=single).domains == ("python",)


def test_a_sequence_longer_than_the_domain_is_refused() -> None:
    with pytest.raises(RequestError, match=r'seq_len 200000 .*"shakespeare" has 111540 bytes'):
        Language(domains=["shakespeare"], seq_len=200_000).prepare(0)


def test_an_empty_domain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = corpus.Split(train=b"", held_out=b"")
    monkeypatch.setattr(corpus, "DOMAINS", {**corpus.DOMAINS, "gsm8k": lambda: empty})
    with pytest.raises(RequestError, match='domain "gsm8k" has no training text'):
        Language(domains=["shakespeare", "gsm8k"]).prepare(0)


def test_models_that_do_not_fit_are_refused(task: Language) -> None:
    model: Any = task.model(0)
    batch = task.train.batch(torch.arange(2))
    model.config.max_position_embeddings = 16
    with pytest.raises(RequestError, match="at most 16 positions"):
        task.losses(model, batch)
    model.config.max_position_embeddings = 32
    model.config.vocab_size = 100
    with pytest.raises(RequestError, match="bytes need 256"):
        task.evaluate(model)


def test_use_before_prepare_is_refused() -> None:
    task = Language(**SMALL)
    for use in (
        lambda: len(task.train),
        lambda: task.train.batch(torch.arange(2)),
        lambda: task.domain_of(torch.arange(2)),
        lambda: task.order(0, torch.Generator()),
        lambda: task.evaluate(Uniform()),
        lambda: task.references(),
        lambda: task.page(Uniform(), 0),
    ):
        with pytest.raises(RequestError, match="call prepare"):
            use()
