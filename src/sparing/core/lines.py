"""Text files by line, plain or compressed, with errors that name file and line."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparing.core.errors import RequestError

_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def kind(path: Path) -> str:
    """The file's suffix without that of its compression: ".jsonl" of "rows.jsonl.xz"."""
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def numbered(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1 on, text without its end) of each line that is not empty.

    Raises RequestError for a file that is not there or is no text in UTF-8.
    """
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path} cannot be read after line {number} ({error}); give a text file in UTF-8"
        ) from error


def numbered_json(path: Path) -> Iterator[tuple[int, Any]]:
    """The same with what each line holds as JSON. Raises RequestError for one that is not JSON."""
    for number, text in numbered(path):
        try:
            held = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(
                f"line {number} of {path} is not JSON ({error.msg} at character {error.pos + 1}); "
                "mend or remove it"
            ) from error
        yield number, held
