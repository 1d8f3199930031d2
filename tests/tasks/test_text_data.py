"""Texts with labels: where they come from, how they are split, how they become tokens."""

from __future__ import annotations

import csv
import io
import lzma
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from encoders_on_disk import WORDS, bert
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import RequestError
from sparing.run import recipe
from sparing.run.runner import planned_steps
from sparing.tasks.language import corpus
from sparing.tasks.text import Text, encoders, sources
from sparing.tasks.text.split import DEVELOPMENT, TEST, same, split
from sparing.tasks.text.tokens import BYTE_VOCABULARY, Tokens, of_bytes

# ---- sources -------------------------------------------------------------------------------------


def news(rows: list[tuple[str, ...]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    return lzma.compress(text.getvalue().encode())


def many(count: int = 80) -> list[tuple[str, ...]]:
    return [(str(i % 4 + 1), f"Title {i}", f'Text "{i}", of news') for i in range(count)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where AG News is looked for; nothing is there yet."""
    monkeypatch.setenv("SPARING_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "text-classification"
    folder.mkdir()
    return folder / sources.AGNEWS_FILE


def test_ag_news_is_read_from_the_users_folder_then_the_cache(place, tmp_path):
    place.write_bytes(news(many()))
    found = sources.load("agnews")
    assert found.classes == ("World", "Sports", "Business", "Sci/Tech")
    assert found.data.texts[5] == 'Title 5 Text "5", of news'
    assert found.data.labels.tolist() == [i % 4 for i in range(80)]
    cached = tmp_path / "cache" / "sparing" / "text-classification"
    cached.mkdir(parents=True)
    place.rename(cached / place.name)
    assert sources.fingerprint(sources.load("agnews").data) == sources.fingerprint(found.data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (news([*many(8), ("5", "a", "b")]), "row 9 of .* is not class 1 to 4"),
        (news([*many(8), ("1", "a")]), "row 9 of .* is not class 1 to 4"),
        (news(many(3)), "does not have all four classes"),
        (news([]), "does not have all four classes"),
        (news(many())[:-20], "cannot be read"),
        (b"1,a,b\n", "cannot be read"),
        (lzma.compress(b"\xff\xfe"), "cannot be read"),
    ],
)
def test_damaged_news(place, content, message):
    place.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        sources.load("agnews")


def test_news_that_are_not_there_or_too_few(place):
    with pytest.raises(RequestError, match=r"no licence: put .* into \$SPARING_DATA.*passages"):
        Text(dataset="agnews").prepare(0)
    place.write_bytes(news(many(4)))
    with pytest.raises(RequestError, match='too few texts of the class "World"'):
        Text(dataset="agnews").prepare(0)


def test_passages_without_the_sources_of_python(monkeypatch, tmp_path):
    monkeypatch.setitem(corpus.DOMAINS, "python", lambda: corpus.python(tmp_path))
    with pytest.raises(RequestError, match=r"passages of Python cannot be made.*dataset=agnews"):
        Text().prepare(0)


def test_passages_are_short_and_say_what_they_are():
    found = sources.load("passages")
    assert len(found.data) == 3 * sources.PER_SOURCE
    assert torch.bincount(found.data.labels).tolist() == [sources.PER_SOURCE] * 3
    assert all(0 < len(text) <= sources.PASSAGE for text in found.data.texts)
    assert all(" ".join(text.split()) == text for text in found.data.texts)


def test_the_fingerprint_is_of_texts_labels_and_their_borders():
    def of(texts: tuple[str, ...], labels: list[int]) -> str:
        return sources.fingerprint(sources.Labelled(texts=texts, labels=torch.tensor(labels)))

    assert of(("ab", "c"), [0, 1]) == of(("ab", "c"), [0, 1])
    others = [of(("a", "bc"), [0, 1]), of(("ab", "c"), [1, 0]), of(("ab", "d"), [0, 1])]
    assert of(("ab", "c"), [0, 1]) not in others


# ---- the split -----------------------------------------------------------------------------------


@given(
    texts=st.lists(st.tuples(st.text("ab ,.A", max_size=4), st.integers(0, 2)), max_size=60),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_a_split_is_whole_disjoint_exact_and_by_text_alone(texts, shuffle):
    keys, labels = [t for t, _ in texts], torch.tensor([k for _, k in texts], dtype=torch.int64)
    found = split(keys, labels)
    parts = {"train": found.train, "development": found.development, "test": found.test}
    together = torch.cat(list(parts.values())).tolist()
    assert sorted(together) == list(range(len(texts)))
    where = {same(keys[i]): name for name, part in parts.items() for i in part.tolist()}
    for name, part in parts.items():
        assert part.tolist() == sorted(part.tolist())
        assert all(where[same(keys[i])] == name for i in part.tolist())  # the same stay together
    first: dict[str, int] = {}
    for text, label in texts:
        first.setdefault(same(text), label)
    for label in range(3):
        distinct = [key for key, k in first.items() if k == label]
        for name, share in (("test", TEST), ("development", DEVELOPMENT)):
            assert sum(where[key] == name for key in distinct) == round(share * len(distinct))
    # texts with one label each go to the same part in any order
    pairs = [(key, first[same(key)]) for key in keys]
    shuffle.shuffle(pairs)
    moved = split([k for k, _ in pairs], torch.tensor([k for _, k in pairs], dtype=torch.int64))
    assert {same(pairs[i][0]) for i in moved.test.tolist()} == {
        same(keys[i]) for i in found.test.tolist()
    }


def test_news_under_another_headline_stay_on_one_side(place):
    rows = many(200)
    rows += [(label, f"Update: {title}", text.upper()) for label, title, text in rows]
    place.write_bytes(news(rows))
    source = sources.load("agnews")
    found = split(source.keys, source.data.labels)
    for part in (found.train, found.development, found.test):
        assert {i % 200 for i in part.tolist() if i < 200} == {
            i % 200 for i in part.tolist() if i >= 200
        }
    assert len(found.test) == 2 * 4 * round(TEST * 50)


# ---- tokens --------------------------------------------------------------------------------------


@given(rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=18), min_size=1),
       data=st.data())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_batches_hold_each_text_then_padding(rows, data):
    tokens = Tokens.of(rows, pad=7, most=18)
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    batch = tokens.batch(torch.tensor(index))
    longest = max(len(rows[i]) for i in index)
    assert batch["input_ids"].shape == (len(index), min(-(-longest // 8) * 8, 18))
    for row, mask, i in zip(batch["input_ids"], batch["attention_mask"], index, strict=True):
        size = len(rows[i])
        assert row[:size].tolist() == rows[i]
        assert (row[size:] == 7).all()
        assert mask.tolist() == [1] * size + [0] * (len(mask) - size)


def test_bytes_are_tokens_behind_a_mark():
    tokens = of_bytes(["é!", "", "long enough"], max_length=6)
    batch = tokens.batch(torch.arange(3))
    assert batch["input_ids"][0].tolist() == [1, 0xC3 + 2, 0xA9 + 2, ord("!") + 2, 0, 0]
    assert tokens.lengths.tolist() == [4, 1, 6]
    assert int(of_bytes(["\xff"], 9).flat.max()) < BYTE_VOCABULARY
    assert tokens.batch(torch.tensor([], dtype=torch.int64))["input_ids"].shape == (0, 0)


def test_a_tokenizers_marks_are_kept_when_texts_are_cut(tmp_path):
    folder = bert(tmp_path / "encoder")
    tokens = encoders.tokens(str(folder), ["the a of self each", "how", ""], 4)
    expected = ["[CLS]", "the", "a", "[SEP]"], ["[CLS]", "how", "[SEP]"], ["[CLS]", "[SEP]"]
    assert tokens.lengths.tolist() == [4, 3, 2]
    assert tokens.flat.tolist() == [WORDS.index(word) for row in expected for word in row]


# ---- the recipe ----------------------------------------------------------------------------------


def test_the_recipe_runs_on_what_is_shipped_and_its_preset_on_news():
    assert recipe.load("adapters-text", smoke=False).task["dataset"] == "passages"
    news = recipe.load("adapters-text", preset="agnews", smoke=False)
    assert (news.task["dataset"], news.task["encoder"]) == ("agnews", "minilm")
    # a text of AG News has 50 tokens on average where 64 are read at most
    assert planned_steps(news, SimpleNamespace(tokens_per_sample=50)) == 100
    small = recipe.load("adapters-text", preset="agnews", smoke=True)
    assert (small.task["dataset"], small.task["encoder"]) == ("passages", "tiny")


def test_the_task_is_known_without_transformers():
    told = subprocess.run(
        [sys.executable, "-c", "import sys; from sparing.core import registry\n"
         "registry.task('text').Options(); assert 'transformers' not in sys.modules"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
