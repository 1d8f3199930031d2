from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from sparing.core.errors import RequestError, RunError
from sparing.tasks.language import corpus


@pytest.fixture(scope="module")
def texts() -> dict[str, corpus.Split]:
    return corpus.load(corpus.DOMAINS)


def test_shakespeare_holds_out_its_last_tenth(texts: dict[str, corpus.Split]) -> None:
    split = texts["shakespeare"]
    assert split.train.startswith(b"First Citizen:\nBefore we proceed any further, hear me speak.")
    assert len(split.train) == (len(split.train) + len(split.held_out)) * 9 // 10
    assert len(split.train) > 1_000_000


def test_gsm8k_holds_out_its_own_test_set(texts: dict[str, corpus.Split]) -> None:
    split = texts["gsm8k"]
    # Every answer ends in "#### number".
    assert split.train.count(b"\n#### ") == 7473
    assert split.held_out.count(b"\n#### ") == 1319
    assert split.held_out.startswith("Janet\u2019s ducks lay 16 eggs per day.".encode())
    assert b"<<48/2=24>>" in split.train
    assert split.train.endswith(b"\n\n")
    train = set(split.train.split(b"\n\n"))
    assert not train & {problem for problem in split.held_out.split(b"\n\n") if problem}


def test_python_holds_out_whole_files(texts: dict[str, corpus.Split]) -> None:
    split = texts["python"]
    share = len(split.held_out) / (len(split.train) + len(split.held_out))
    assert 0.01 < share < 0.12
    path = Path(sysconfig.get_path("stdlib"), "argparse.py")
    source = path.read_bytes()
    assert (source in split.held_out) == corpus.is_held_out("argparse.py")
    assert (source in split.train) != (source in split.held_out)


def test_the_development_split_never_sees_the_held_out_text(texts: dict[str, corpus.Split]) -> None:
    for split in texts.values():
        part = corpus.development(split)
        assert part.train + part.held_out == split.train
        assert len(part.train) == len(split.train) * 9 // 10


def test_which_files_are_held_out_does_not_change() -> None:
    # Known by heart, so that a change of the rule, which changes every result, is seen.
    held_out = [
        name
        for name in ("fileinput.py", "argparse.py", "json/decoder.py", "ast.py", "random.py")
        if corpus.is_held_out(name)
    ]
    assert held_out == ["fileinput.py"]
    share = sum(corpus.is_held_out(f"package/module{i}.py") for i in range(20000)) / 20000
    assert abs(share - 13 / 256) < 0.006


def _tree(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())


def test_library_files_are_sorted_deduplicated_and_filtered(tmp_path: Path) -> None:
    long = "x = 1\n" * 30
    _tree(
        tmp_path,
        {
            "b.py": long + "b",
            "a/z.py": long + "z",
            "a.py": long + "a\r\n",
            "copy_of_b.py": long + "b",
            "short.py": "x = 1\n",
            "blank.py": "\n" * 500,
            "notes.txt": long,
            "test/test_b.py": long + "t",
            "a/tests/t.py": long + "u",
            "site-packages/other.py": long + "o",
            "config-3.11-x86_64/python-config.py": long + "c",
            "_sysconfigdata__linux_.py": long + "d",
            "sitecustomize.py": long + "e",
        },
    )
    found = corpus.python_files(tmp_path)
    assert list(found) == ["a.py", "a/z.py", "b.py"]
    assert found["a.py"] == (long + "a\n").encode()


def test_missing_sources_say_where_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        corpus.python(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert "-s task.domains=[shakespeare,gsm8k]" in str(caught.value)


def test_an_unreadable_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.py").symlink_to(tmp_path / "target-that-is-not-there")
    with pytest.raises(RequestError, match=r"gone\.py.*leave the domain out"):
        corpus.python(tmp_path)


def test_unknown_domain_names_the_nearest() -> None:
    with pytest.raises(RequestError, match='did you mean "shakespeare"'):
        corpus.load(["shakespear"])


def test_a_missing_bundled_file_says_to_install_again() -> None:
    with pytest.raises(RunError, match="install sparing again"):
        corpus._bundled("milton.txt.xz")


def test_fingerprint_sees_every_part_and_no_order() -> None:
    one = {
        "a": corpus.Split(train=b"ab", held_out=b"c"),
        "b": corpus.Split(train=b"d", held_out=b"e"),
    }
    base = corpus.fingerprint(one)
    assert len(base) == 64
    assert base == corpus.fingerprint(dict(reversed(one.items())))
    others = [
        {**one, "a": corpus.Split(train=b"a", held_out=b"bc")},
        {**one, "a": corpus.Split(train=b"ab", held_out=b"x")},
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"]},
    ]
    assert len({base, *map(corpus.fingerprint, others)}) == 5
