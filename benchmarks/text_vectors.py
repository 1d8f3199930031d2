"""Vectors of many distinct real texts, for measurements of search and ingest.

    SPARING_DATA=... python benchmarks/text_vectors.py OUT.npy [--count 120000] [--threads 2]
        [--dtype bfloat16]

Sentences of AG News, GSM8K, Shakespeare and instructions from $SPARING_DATA (what is not there is
left out), and of the docstrings and comments of Python's own standard library. Each is taken once,
without regard to case and spaces; ``--count`` of them are drawn by a fixed seed and encoded by
MiniLM to 32 tokens, projected to 256 values and divided by their length: OUT.npy, (n, 256) float32,
in the order drawn, without equal ones. Beside it OUT.json tells how many texts each source gave. It
is written in parts (OUT.parts), and goes on with them where it was stopped. float32 takes some ten
minutes of a core; processors with AMX need a third of that for bfloat16, whose vectors have a
cosine of at least .9999 with the others.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import lzma
import re
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from sparing.core.cache import places
from sparing.pool.encoders import encode, encoder
from sparing.pool.items import Item

DIM, TOKENS, PART, SEED = 256, 32, 4096, 0
WORDS, LETTERS = 4, 20
"""The least of a text: shorter ones are names and numbers more often than sentences."""
ENDS = re.compile(r"(?<=[.!?])\s+|\n\s*\n|\n(?=\s*[-*A-Z\"'])")


def sentences(text: str) -> Iterator[str]:
    """Its sentences and lines that are long enough to say something."""
    for part in ENDS.split(text):
        found = " ".join(part.split())
        if len(found) >= LETTERS and sum(word.isalpha() for word in found.split()) >= WORDS:
            yield found


def opened(folder: str, name: str) -> str:
    """A packed file of $SPARING_DATA or the cache; "" where there is none."""
    for place in places(folder):
        if (place / name).is_file():
            return lzma.decompress((place / name).read_bytes()).decode()
    return ""


def lines(folder: str, name: str) -> Iterator[str]:
    """Those that are not empty; a text may hold other signs that end a line, such as U+2028."""
    return filter(None, opened(folder, name).split("\n"))


def agnews() -> Iterator[str]:
    for row in csv.reader(io.StringIO(opened("text-classification", "agnews_7600.csv.xz"))):
        yield from row[1:]


def gsm8k() -> Iterator[str]:
    for part in ("train", "test"):
        for line in lines("corpus", f"gsm8k_{part}.jsonl.xz"):
            yield from json.loads(line).values()


def shakespeare() -> Iterator[str]:
    yield from opened("corpus", "shakespeare.txt.xz").split("\n\n")


def instructions() -> Iterator[str]:
    for line in lines("instructions", "t0_55k.jsonl.xz"):
        row = json.loads(line)
        yield row["prompt"]
        yield row["completion"].removesuffix("<|endoftext|>")


def library() -> Iterator[str]:
    """Docstrings, and comments that stand together, of the running Python; not of its tests."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(source)
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
            continue  # files that test what is not Python
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""
        block: list[str] = []
        last = -2
        for token in tokens:
            if token.type == tokenize.COMMENT:
                if token.start[0] > last + 1:
                    yield "\n".join(block)
                    block = []
                block.append(token.string.lstrip("#! "))
                last = token.start[0]
        yield "\n".join(block)


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "AG News": agnews,
    "GSM8K": gsm8k,
    "Shakespeare": shakespeare,
    "instructions": instructions,
    "Python's library": library,
}


def gathered() -> tuple[list[str], list[str]]:
    """Distinct texts, and the source of each."""
    texts: list[str] = []
    source: list[str] = []
    seen: set[str] = set()
    for name, read in SOURCES.items():
        for whole in read():
            for text in sentences(whole):
                key = text.casefold()
                if key not in seen:
                    seen.add(key)
                    texts.append(text)
                    source.append(name)
    return texts, source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=120_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts, source = gathered()
    print(f"{len(texts)} distinct texts", flush=True)
    drawn = np.random.Generator(np.random.SFC64(SEED)).permutation(len(texts))[: options.count]
    made = encoder("minilm", max_length=TOKENS, dim=DIM, dtype=options.dtype)
    # texts of like length are encoded together, which needs the least padding
    order = drawn[np.argsort([len(texts[at]) for at in drawn], kind="stable")]
    parts = options.out.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for at in range(0, len(order), PART):
        path = parts / f"{options.dtype}-{len(texts)}-{len(order)}-{at}.npy"
        if path.is_file():
            continue
        items = [Item(key=str(i), text=texts[i]) for i in order[at : at + PART]]
        found = encode(made, items)
        if found.drops:
            raise SystemExit(f"{len(found.drops)} texts have no vector: {found.drops[0]}")
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, found.vectors.main.astype(np.float32))
        partial.replace(path)
        print(f"{at + len(items)} after {time.perf_counter() - start:.0f} s", flush=True)
    rows = np.concatenate(
        [
            np.load(parts / f"{options.dtype}-{len(texts)}-{len(order)}-{at}.npy")
            for at in range(0, len(order), PART)
        ]
    )
    out = np.empty_like(rows)
    out[np.argsort(drawn)] = rows[np.argsort(order)]
    # texts that are equal in their first words have equal vectors: only one of them counts
    first = np.sort(np.unique(out, axis=0, return_index=True)[1])
    out, drawn = out[first], drawn[first]
    np.save(options.out, out)
    names, counts = np.unique(np.array(source)[drawn], return_counts=True)
    told = {
        "distinct texts": len(out),
        "of each source": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "encoder": made.version,
    }
    options.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    print(told)


if __name__ == "__main__":
    main()
