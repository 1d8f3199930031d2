"""The text of each domain, split into training and held-out parts, and its hash."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import final

from sparing.core.errors import RequestError, RunError, unknown

# Directories that are not the library itself: installed packages, tests, and what some
# distributions move to packages of their own, so that more machines agree on the text.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "turtledemo",
        "__pycache__",
    }
)
# Files that a build or a site writes, with paths of the machine in them.
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
_SKIPPED_FOLDER_PREFIX = "config-"
_SMALLEST_FILE = 100
_HELD_OUT_OF_256 = 13


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One domain's text as bytes: ``train`` to learn from, ``held_out`` only to evaluate on."""

    train: bytes
    held_out: bytes


def _bundled(file: str) -> bytes:
    found = resources.files("sparing.tasks.language").joinpath("data", file)
    try:
        return lzma.decompress(found.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise RunError(
            f"the bundled text {file} cannot be read ({error}); install sparing again"
        ) from error


def shakespeare() -> Split:
    """Tiny Shakespeare; its last tenth is held out."""
    text = _bundled("shakespeare.txt.xz")
    cut = len(text) * 9 // 10
    return Split(train=text[:cut], held_out=text[cut:])


def gsm8k() -> Split:
    """GSM8K, calculator annotations kept; its own test set is held out."""

    def problems(file: str) -> bytes:
        rows = map(json.loads, _bundled(file).splitlines())
        return "".join(f"{row['question']}\n{row['answer']}\n\n" for row in rows).encode()

    return Split(train=problems("gsm8k_train.jsonl.xz"), held_out=problems("gsm8k_test.jsonl.xz"))


def is_held_out(relative_path: str) -> bool:
    """Whether a library file is held out (13 of 256): by the hash of its path, not its content."""
    digest = hashlib.sha1(relative_path.encode(), usedforsecurity=False).digest()
    return digest[0] < _HELD_OUT_OF_256


def python_files(root: Path) -> dict[str, bytes]:
    """Relative path -> content of the library's sources under ``root``, sorted by path.

    Left out are installed packages, tests, files that the build or the site wrote, files of less
    than 100 bytes, and all but the first of files with the same content. Line ends become ``\\n``.
    """
    found: list[tuple[str, Path]] = []
    for folder, below, files in os.walk(root):
        below[:] = [
            name
            for name in below
            if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_FOLDER_PREFIX)
        ]
        for file in files:
            if file.endswith(".py") and not file.startswith(_SKIPPED_FILES):
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path))
    seen: set[bytes] = set()
    kept: dict[str, bytes] = {}
    for relative, path in sorted(found):
        try:
            content = path.read_bytes().replace(b"\r\n", b"\n")
        except OSError as error:
            raise RequestError(
                f"cannot read {path} of Python's standard library ({error.strerror}); make it "
                "readable, or leave the domain out: -s task.domains=[shakespeare,gsm8k]"
            ) from error
        digest = hashlib.sha256(content).digest()
        if len(content.strip()) >= _SMALLEST_FILE and digest not in seen:
            seen.add(digest)
            kept[relative] = content
    return kept


def python(root: Path | None = None) -> Split:
    """The running interpreter's standard library; whole files are held out by hash of their path.

    Raises RequestError where the sources are missing (some distributions ship bytecode only).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = python_files(root)
    if not files:
        raise RequestError(
            f"no sources of Python's standard library in {root}; install them, or leave the "
            "domain out: -s task.domains=[shakespeare,gsm8k]"
        )
    return Split(
        train=b"".join(text for path, text in files.items() if not is_held_out(path)),
        held_out=b"".join(text for path, text in files.items() if is_held_out(path)),
    )


DOMAINS: Mapping[str, Callable[[], Split]] = {
    "shakespeare": shakespeare,
    "gsm8k": gsm8k,
    "python": python,
}


def development(split: Split) -> Split:
    """The same text without its held-out part: the last tenth of the training text stands in.

    Settings are chosen on this split, so that the held-out text stays unseen until the end.
    """
    cut = len(split.train) * 9 // 10
    return Split(train=split.train[:cut], held_out=split.train[cut:])


def load(domains: Iterable[str]) -> dict[str, Split]:
    """The texts of ``domains``, in that order. Raises RequestError for an unknown domain."""
    texts: dict[str, Split] = {}
    for name in domains:
        if name not in DOMAINS:
            raise unknown("domain", name, DOMAINS)
        texts[name] = DOMAINS[name]()
    return texts


def fingerprint(texts: Mapping[str, Split]) -> str:
    """SHA-256 over names and texts of all domains: results on other data are not comparable."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        split = texts[name]
        for part in (name.encode(), split.train, split.held_out):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()
