"""Continued pre-training: windows, what the model writes itself, models that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparing
from sparing.convert import Conversion, convert
from sparing.core.decoding import continued, first_token
from sparing.core.errors import RequestError
from sparing.experts.layer import expert_layers
from sparing.tasks import causal
from sparing.tasks.continued import Continued
from sparing.tasks.instruct import Instruct

STORIES = causal.directory(causal.STORIES)
SMALL: dict[str, Any] = {"seq_len": 24, "windows": 20, "eval_windows": 5, "sample_tokens": 6}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prepared(**options: Any) -> Continued:
    made = Continued(**{**SMALL, **options})
    made.prepare(0)
    return made


def parts(task: Continued) -> tuple[torch.Tensor, torch.Tensor]:
    train, held = task._ready()
    return train.rows, held.rows


# ---- data ----------------------------------------------------------------------------------------


def test_windows_are_the_texts_tokens_in_order_and_held_out_ones_are_others(tmp_path: Path):
    lines = [f"Tom saw {i} birds and {i + 1} dogs." for i in range(400)]
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(lines))
    task = prepared(domains=["shakespeare"], files={"mine": str(file)})
    assert task.domains == ("shakespeare", "mine")
    train, held = parts(task)
    assert train.shape == (40, 25)
    assert held.shape == (10, 25)
    text = task._text(train[task.domain_of(torch.arange(40)) == 1][:, :-1].flatten())
    assert text.strip().startswith("Tom saw 0 birds and 1 dogs.\nTom saw 1 birds")
    # labels are the tokens that follow, and a window begins with the last label of the one before
    batch = task.train.batch(torch.tensor([20, 21]))
    assert batch["labels"][:, :-1].equal(batch["input_ids"][:, 1:])
    assert batch["labels"][0, -1] == batch["input_ids"][1, 0]
    unseen = task._text(held[5:, :-1].flatten())
    assert "Tom saw 36" in unseen
    assert "Tom saw 35" not in unseen
    assert sorted(task.order(0, torch.Generator().manual_seed(1)).tolist()) == list(range(40))


def test_own_text_is_the_models_and_kept(monkeypatch: pytest.MonkeyPatch):
    task = prepared(domains=["own"])
    train, held = parts(task)
    first = first_token(task.model(0).config)
    assert bool((train[:, 0] == first).all())
    generator = torch.Generator().manual_seed(0)
    model = causal.pretrained(STORIES)
    expected = continued(model, torch.full((20, 1), first), 24, generator=generator)
    assert train[:, 1:].long().equal(expected)
    assert not held.equal(train[:5])
    # what the model writes is likely for it: far below the 6.2 nats of chance
    assert task.evaluate(model)["nats_per_token"] < 3

    def never(*args: Any, **named: Any) -> Any:
        raise AssertionError("it is kept")

    monkeypatch.setattr("sparing.tasks.continued.own.continued", never)
    again = prepared(domains=["own"])
    assert all(a.equal(b) for a, b in zip(parts(again), parts(task), strict=True))
    assert again.fingerprint == task.fingerprint
    with pytest.raises(AssertionError):
        prepared(domains=["own"], own_seed=1)


def test_a_damaged_cache_is_made_again(tmp_path: Path):
    task = prepared(domains=["own"])
    for file in (tmp_path / "cache" / "sparing").glob("own-*"):
        file.write_bytes(b"no tensors")
    assert prepared(domains=["own"]).fingerprint == task.fingerprint


def test_development_text_is_no_part_of_the_final_one():
    final, development = (prepared(domains=["gsm8k"], split=s) for s in ("final", "development"))
    assert parts(final)[0].equal(parts(development)[0])
    assert not parts(final)[1].equal(parts(development)[1])


def test_the_metric_is_the_mean_over_domains_of_the_loss():
    task = prepared(domains=["shakespeare", "gsm8k"])
    model = task.model(0)
    scores, each = task.evaluate(model), task.documents(model)
    assert scores["nats_per_token"] == pytest.approx(
        sum(float(part.mean()) for part in each.values()) / 2
    )
    assert task.references()["before"]["mean"] == pytest.approx(scores["nats_per_token"])
    held = parts(task)[1].long()
    with torch.no_grad():
        loss = float(model.eval()(input_ids=held[:5], labels=held[:5]).loss)
    assert scores["nats_per_token/shakespeare"] == pytest.approx(loss, abs=1e-5)
    shown = task.page(model, 0)["samples"]
    assert [sample["domain"] for sample in shown] == ["shakespeare", "gsm8k"]
    assert all(sample["prompt"] and sample["text"] for sample in shown)
    assert task.show(model, [0, 25])[1]["caption"] == "gsm8k"


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sparing", "export"])
def test_both_tasks_take_a_converted_directory(form: str, tmp_path: Path):
    options = Conversion(experts=4, active=2, form=form)  # type: ignore[arg-type]
    convert(STORIES, tmp_path / "made", options)
    task = prepared(domains=["shakespeare"], model=str(tmp_path / "made"))
    model = task.model(0)
    assert len(expert_layers(model)) == (5 if form == "sparing" else 0)
    assert 5 < task.evaluate(model)["nats_per_token"] < 12
    path = tmp_path / "written"
    if form == "sparing":
        sparing.save(model, path)
        back = sparing.load(path)
    else:
        task.export(model, path)
        back = task.load(path)
    assert all(back.state_dict()[key].equal(value) for key, value in model.state_dict().items())
    tuned = Instruct(
        model=str(tmp_path / "made"), sources=["spelling"], eval_examples=3, seq_len=64
    )
    tuned.prepare(0)
    assert tuned.tokens.size == 512
    assert tuned.evaluate(tuned.model(0))["completion_loss"] > 1


def test_models_that_do_not_fit_are_told(tmp_path: Path):
    with pytest.raises(RequestError, match="there is no model in"):
        prepared(model=str(tmp_path / "none"))
    empty = tmp_path / "empty"
    shutil.copytree(STORIES, empty)
    (empty / "model.safetensors").unlink()
    for made in (
        Continued(**SMALL, model=str(empty)),
        Instruct(model=str(empty)),
    ):
        with pytest.raises(RequestError, match="no weights"):
            made.prepare(0)
    torn = tmp_path / "torn"
    shutil.copytree(STORIES, torn)
    (torn / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(RequestError, match="no whole causal language model"):
        causal.pretrained(torn)
    part = tmp_path / "part"
    shutil.copytree(STORIES, part)
    body = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**body, "num_hidden_layers": 6}))
    with pytest.raises(RequestError, match="lacks 9 of its model's weights"):
        causal.pretrained(part)
    with pytest.raises(RequestError, match="at most 512 positions"):
        prepared(domains=["gsm8k"], seq_len=600).model(0)
    with pytest.raises(RequestError, match="at most 512 positions"):
        prepared(domains=["own"], seq_len=600)


def test_a_vocabulary_or_template_that_does_not_fit_is_told(tmp_path: Path):
    odd = tmp_path / "odd"
    shutil.copytree(STORIES, odd)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer.add_tokens([f"<new{i}>" for i in range(3)])
    tokenizer.save_pretrained(odd)
    with pytest.raises(RequestError, match=r"515 tokens, and the model in .* knows 512"):
        prepared(domains=["gsm8k"], model=str(odd)).model(0)
    tuned = Instruct(model=str(odd), sources=["spelling"], eval_examples=3, seq_len=64)
    tuned.prepare(0)
    with pytest.raises(RequestError, match="515 tokens"):
        tuned.model(0)
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "b"}]}
        for i in range(60)
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = Instruct(dataset="files", files={"chat": str(chat)}, model=causal.STORIES)
    with pytest.raises(RequestError, match="no chat template"):
        talks.prepare(0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"domains": ["shakespear"]}, 'did you mean "shakespeare"'),
        ({"domains": []}, "domains is empty"),
        ({"domains": ["own", "own"]}, "names one twice"),
        ({"files": {"own": "x"}}, "which is a domain already"),
        ({"domains": [], "files": {"mine": "/no/such"}}, "cannot be read"),
        ({"window": 3}, 'did you mean "windows"'),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], told: str):
    with pytest.raises(RequestError, match=told):
        prepared(**options)


def test_bad_files_are_told_by_line(tmp_path: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(RequestError, match=r'line 2 of .*bad\.jsonl is no object with "text"'):
        prepared(domains=[], files={"bad": str(bad)})
    bad.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(RequestError, match=r"line 2 of .*bad\.jsonl is not JSON"):
        prepared(domains=[], files={"bad": str(bad)})
    bad.write_text("\n")
    with pytest.raises(RequestError, match='the domain "bad" is empty'):
        prepared(domains=[], files={"bad": str(bad)})
    short = tmp_path / "short.txt"
    short.write_text("a\n" * 12)
    with pytest.raises(RequestError, match=r'domain "short" has \d+ tokens of held-out text'):
        prepared(domains=[], files={"short": str(short)}, seq_len=8)


def test_a_model_without_a_first_token_writes_nothing():
    class Config:
        bos_token_id = eos_token_id = None

    with pytest.raises(RequestError, match="names no first token"):
        first_token(Config())
