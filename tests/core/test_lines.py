"""Lines of files, plain and compressed, with errors that name file and line."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from sparing.core.errors import RequestError
from sparing.core.lines import kind, numbered, numbered_json


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_lines_keep_their_numbers_and_lose_their_ends(suffix: str, tmp_path: Path):
    path = tmp_path / f"rows.jsonl{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    path.write_bytes(pack(b'{"a": 1}\r\n\n  \n[2] \n'))
    assert list(numbered(path)) == [(1, '{"a": 1}'), (4, "[2] ")]
    assert list(numbered_json(path)) == [(1, {"a": 1}), (4, [2])]
    assert kind(path) == ".jsonl"


def test_what_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(RequestError, match=r"none\.txt cannot be read after line 0"):
        list(numbered(tmp_path / "none.txt"))
    short = tmp_path / "short.xz"
    short.write_bytes(lzma.compress(b"one\ntwo\n" * 1000)[:-20])
    with pytest.raises(RequestError, match="cannot be read after line"):
        list(numbered(short))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('1\n\n{"a": \n')
    with pytest.raises(RequestError, match=r"line 3 of .*broken\.jsonl is not JSON"):
        list(numbered_json(broken))
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(RequestError, match="UTF-8"):
        list(numbered(latin))
