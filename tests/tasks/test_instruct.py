"""The instruction task: what is learnt of an example, packing, sources, bad files, a whole run."""

from __future__ import annotations

import json
import lzma

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparing
from sparing.core.errors import RequestError
from sparing.experts.layer import expert_layers
from sparing.run.report.mixture import mixture
from sparing.run.report.read import read
from sparing.tasks.instruct import Instruct, derived, templates
from sparing.tasks.instruct.packing import IGNORED, first_fit, laid_out
from sparing.tasks.instruct.tokens import END, ByteTokens, HubTokens, encoded

SMALL = {"dim": 16, "width": 24, "seq_len": 64, "eval_examples": 6, "per_source": 30}


@pytest.fixture(scope="module")
def task() -> Instruct:
    made = Instruct(**SMALL, sources=["calculate", "speaker", "spelling"])
    made.prepare(0)
    return made


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- what is learnt ------------------------------------------------------------------------------


def test_only_completions_are_learnt():
    ids, learnt = ByteTokens().pair("2+2=", "4")
    assert ids == [*b"2+2=\n", ord("4"), END]
    assert learnt == [False] * 5 + [True] * 2
    row = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "so"},
            {"role": "assistant", "content": "no"},
        ]
    }
    ids, learnt = encoded(row, ByteTokens(), "here", 200)
    said = bytes(i for i, part in zip(ids, learnt, strict=True) if part and i < 256)
    assert said == b"yesno"
    assert sum(learnt) == 7  # the ends too


def test_a_long_example_keeps_its_question_end_and_its_answers_beginning():
    row = {"prompt": "x" * 90 + "END", "completion": "answer" + "y" * 80}
    ids, learnt = encoded(row, ByteTokens(), "here", 40)
    assert len(ids) == 40
    assert sum(learnt) == 20
    assert ByteTokens().text(ids) == "x" * 16 + "END\n" + "answer" + "y" * 14
    short = {"prompt": "x" * 90, "completion": "ok"}
    ids, learnt = encoded(short, ByteTokens(), "here", 40)
    assert ids[-3:] == [*b"ok", END]


def hub(tmp_path, template):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<s>", "</s>", "U:", "A:", "a", "b", "c", "?"])}
    inner = Tokenizer(WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    made.chat_template = template
    made.save_pretrained(tmp_path)
    return str(tmp_path)


TEMPLATE = (
    "<s> {% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }} "
    "{% else %}A: {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


def test_a_tokenizers_template_is_used_and_answers_are_learnt(tmp_path):
    tokens = HubTokens(hub(tmp_path, TEMPLATE))
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "a b"},
    ]
    ids, learnt = encoded({"messages": turns}, tokens, "here", 100)
    assert ids == [0, 2, 4, 3, 5, 1, 2, 6, 3, 4, 5, 1]
    assert [i for i, part in zip(ids, learnt, strict=True) if part] == [5, 1, 4, 5, 1]
    pair = encoded({"prompt": "a", "completion": "b"}, tokens, "here", 100)
    assert pair == ([0, 2, 4, 3, 5, 1], [False] * 4 + [True] * 2)


def test_chat_without_a_template_is_told(tmp_path):
    path = hub(tmp_path / "tokens", None)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{"role": "user", "content": f"a {i}"}, chat[1]]} for i in range(40)]
    file = jsonl(tmp_path / "chat.jsonl", rows)
    made = Instruct(dataset="files", files={"chat": file}, tokenizer=path, held_out=0.4)
    with pytest.raises(RequestError, match="no chat template"):
        made.prepare(0)
    with pytest.raises(RequestError, match="no chat template, and the data is chat"):
        encoded({"messages": chat}, HubTokens(path), "here", 100)
    # prompt and completion need none
    assert encoded({"prompt": "a", "completion": "b"}, HubTokens(path), "here", 9)[0] == [4, 5, 1]


def test_a_template_that_rewrites_the_past_is_told(tmp_path):
    odd = "{{ messages | length }} {% for m in messages %}A: {{ m.content }} {% endfor %}"
    turns = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(RequestError, match="changes earlier messages"):
        encoded({"messages": turns}, HubTokens(hub(tmp_path, odd)), "here", 100)


# ---- packing -------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_first_fit_holds_each_example_once_and_no_row_too_long(lengths):
    rows = first_fit(lengths, 30)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 30
    assert len(rows) <= 2 * sum(lengths) / 30 + 1


def test_who_sees_whom_in_a_packed_row():
    ids = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7])]
    learnt = [torch.tensor([False, True, True]), torch.tensor([False, False, True, True])]
    batch = laid_out([*ids, ids[0]], [*learnt, learnt[0]], [[0, 1], [2]])
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5, 6], [1, 2, 0, 0, 0]]
    ignored = IGNORED
    assert batch["labels"].tolist() == [[2, 3, ignored, 6, 7], [2, 3] + [ignored] * 3]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert batch["owner"].tolist() == [[0, 0, 1, 1, 1], [2, 2, -1, -1, -1]]
    sees = batch["attention_mask"][:, 0].int().tolist()
    assert sees[0] == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1],
    ]  # fmt: skip
    assert sees[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]] + [[1, 0, 0, 0, 0]] * 3


@pytest.mark.parametrize("experts", [False, True])
def test_a_packed_example_has_the_loss_that_it_has_alone(task, experts):
    model = task.model(0)
    if experts:
        sparing.moefy_(model, sparing.TopK(experts=4, k=2), width=8)
    model.eval()
    index = torch.arange(0, 90, 7)
    batch = task.train.batch(index)
    assert batch["attention_mask"].ndim == 4
    assert batch["input_ids"].shape[0] < len(index)
    with torch.no_grad():
        packed, _ = task.losses(model, batch)
        alone = torch.cat([task.losses(model, task.train.batch(i[None]))[0] for i in index])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    # and no other example moves it, not even a little
    changed = dict(batch)
    changed["input_ids"] = torch.where(batch["owner"] == 0, 65, batch["input_ids"])
    with torch.no_grad():
        moved, _ = task.losses(model, changed)
    assert moved[1:].equal(packed[1:])
    assert moved[0] != packed[0]


@pytest.mark.parametrize("pack", [False, True])
def test_padding_is_never_routed_and_sources_are_told_token_by_token(pack):
    made = Instruct(**SMALL, sources=["calculate", "speaker", "spelling"], pack=pack)
    made.prepare(0)
    method = sparing.TopK(experts=4, k=2)
    session = sparing.Session(
        made.model(0),
        [method],
        data=made.train,
        losses=made.losses,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01),
        batch_size=11,
        steps=1,
        domain_of=made.domain_of,
        domains=made.domains,
        dry_run=False,
    )
    for batch, context in session:
        each, outputs = session.forward(batch)
        index = context.index[:, 0]
        lengths = made.train.lengths(index)
        layer = expert_layers(session.unwrapped)[0]
        assert int(layer.record.tokens) == int(lengths.sum())
        assert int(layer.record.load.sum()) == 2 * int(lengths.sum())
        by_source = torch.zeros(3, dtype=torch.int64).index_add(
            0, made.domain_of(index), 2 * lengths
        )
        assert layer.record.domain_load is not None
        assert layer.record.domain_load.sum(1).tolist() == by_source.tolist()
        session.step(each, context, outputs)
    assert session.clock.tokens == int(lengths.sum())


# ---- sources -------------------------------------------------------------------------------------


def test_nine_sources_are_shipped_and_none_asks_in_training_what_it_asks_held_out():
    for split in ("final", "development"):
        found = derived.load(split)
        assert len(found) == 9
        for train, held in found.values():
            assert len(held) >= 20
            assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
            assert all(row["completion"] for row in train + held)
    final, development = derived.load("final"), derived.load("development")
    asked = {row["prompt"] for row in final["speaker"][1]}
    assert not asked & {row["prompt"] for row in development["speaker"][0]}


def test_t0_is_split_by_example_and_not_by_row(tmp_path, monkeypatch):
    rows = [
        {
            "task": f"{name}_{form}",
            "prompt": f"{form} {name} {i}",
            "completion": f"{i}<|endoftext|>",
        }
        for name in ("ag_news", "imdb", "wiki_qa", "paws", "xsum", "sciq", "dream", "ropes")
        for form in ("first", "second")
        for i in range(200)
    ]
    rows += [{"task": "imdb_short", "prompt": "?", "completion": "no"}] * 9
    (tmp_path / "instructions").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "instructions" / templates.FILE).write_bytes(lzma.compress(text))
    monkeypatch.setenv("SPARING_DATA", str(tmp_path))
    for split in ("final", "development"):
        found = templates.load(split)
        assert len(found) == 8
        for train, held in found.values():
            numbers = [{int(row["completion"]) for row in part} for part in (train, held)]
            assert max(numbers[0]) < min(numbers[1]) - 1
            assert len(held) == (50 if split == "final" else 44)
            assert all(row["prompt"] != "?" for row in train)
    monkeypatch.setenv("SPARING_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    with pytest.raises(RequestError, match=r"not at hand.*task\.dataset=derived"):
        templates.load("final")
    with pytest.raises(RequestError, match='template "unheard_of"'):
        templates.group_of("unheard_of")


def test_own_files_by_source(tmp_path):
    files = {
        name: jsonl(
            tmp_path / f"{name}.jsonl",
            [{"prompt": f"{name} {i // 2}", "completion": str(i)} for i in range(200)],
        )
        for name in ("one", "two")
    }
    made = Instruct(dataset="files", files=files, seq_len=32, eval_examples=100)
    made.prepare(0)
    assert made.domains == ("one", "two")
    train, held = made._ready()
    assert len(train) + len(held) == 400

    def asked(part):
        borders = zip(part.ends[:-1].tolist(), part.ends[1:].tolist(), strict=True)
        return {ByteTokens().text(part.ids[a:b][~part.learnt[a:b]].tolist()) for a, b in borders}

    assert not asked(train) & asked(held)  # the same question is never on both sides


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"line 2 of .*x\.jsonl is not JSON"),
        ('{"question": "a"}\n', r"line 1 of .* has neither prompt and completion nor messages"),
        ('{"prompt": "a", "completion": ""}\n', r"line 1 of .* one to learn"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "one of the assistant's"),
        ('{"messages": "a"}\n', r"line 1 of .*messages must be a list"),
        ("\n\n", 'source "x" is empty'),
        ('["a"]\n', "but list"),
    ],
)
def test_bad_files_are_told_by_line(tmp_path, lines, told):
    good = "".join(json.dumps({"prompt": str(i), "completion": "b"}) + "\n" for i in range(1, 60))
    path = tmp_path / "x.jsonl"
    path.write_text(lines + (good if lines.strip() else ""))
    made = Instruct(dataset="files", files={"x": str(path)}, held_out=0.2)
    with pytest.raises(RequestError, match=told):
        made.prepare(0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dataset": "p3"}, 'unknown data set "p3"'),
        ({"dataset": "files"}, "files by source go with"),
        ({"files": {"a": "b"}}, "files by source go with"),
        ({"dataset": "files", "files": {"a": "/no/such"}}, "cannot be read"),
        ({"sources": ["speling"]}, 'unknown source "speling"; did you mean "spelling"'),
        ({"sources": []}, "sources is empty"),
        ({"heads": 3}, "multiple of heads"),
        ({"seq_lenn": 3}, 'did you mean "seq_len"'),
        ({"tokenizer": "/no/such/tokenizer"}, "no tokenizer in"),
    ],
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(RequestError, match=told):
        Instruct(**options).prepare(0)


# ---- the metric and a whole run ------------------------------------------------------------------


def test_every_source_counts_alike_and_documents_are_examples(task):
    model = task.model(0)
    scores = task.evaluate(model)
    each = task.documents(model)
    assert set(each) == set(task.domains)
    mean = sum(float(part.mean()) for part in each.values()) / 3
    assert scores["completion_loss"] == pytest.approx(mean)
    held = task._ready()[1]
    with torch.no_grad():
        alone = task.losses(model.eval(), held.batch(torch.tensor([3])))[0]
    assert float(each[task.domains[0]][3]) == pytest.approx(float(alone), abs=1e-5)


def test_references_are_told_the_source_and_better_than_chance(task):
    found = task.references()
    assert set(found) == {"counts", "pairs"}
    assert set(found["pairs"]) == {*task.domains, "mean"}
    assert found["pairs"]["mean"] < found["counts"]["mean"] < 5.55


def test_the_model_comes_back_from_disk(task, tmp_path):
    model = task.model(1)
    task.export(model, tmp_path / "model")
    back = task.load(tmp_path / "model")
    for key, value in model.state_dict().items():
        assert back.state_dict()[key].equal(value)


def test_the_recipe_runs_and_its_page_shows_weights_and_losses_by_source(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_SMOKE", "1")
    from sparing.run import recipe, runner

    summary = runner.run(recipe.load("instruct-mix"), tmp_path / "run")
    assert summary["methods"]["mix"]["ticks"] == 4
    shown = mixture(read(tmp_path / "run"))
    assert shown is not None
    assert [c.title.split(",")[0].split(" by")[0] for c in shown["charts"]] == [
        "sampling weight",
        "training loss since the last tick",
        "completion loss",
    ]
    assert len(shown["rows"]) == 9
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Which sources it drew from" in page
    assert "missing word" in page
    assert "Nothing about experts was recorded" not in page


def test_a_preset_that_takes_a_method_out_keeps_it_out_of_the_smoke_run():
    from sparing.run import recipe

    small = recipe.load("instruct-mix", preset="converted", smoke=True)
    assert list(small.methods) == ["mix", "convert"]
    assert small.methods["mix"]["every"] == 10
    assert recipe.load("instruct-mix", smoke=True).methods["top-k"]["width"] == 8
