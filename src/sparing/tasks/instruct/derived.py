"""Nine small tasks made of the shipped texts: nothing further needs a licence.

Shakespeare is in the public domain, GSM8K is under the MIT licence (see the language task's data).
An example of a task is held out exactly if the text that it was made of is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from sparing.tasks.language import corpus

Row = dict[str, str]
Rows = list[Row]


def _row(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion}


def _speeches(text: str) -> list[tuple[str, list[str]]]:
    """(speaker, lines) of the plays."""
    found = []
    for block in text.split("\n\n"):
        head, _, rest = block.strip().partition("\n")
        lines = [line.strip() for line in rest.split("\n") if line.strip()]
        if head.endswith(":") and lines:
            found.append((head[:-1], lines))
    return found


def _lines(text: str) -> list[str]:
    return [line for _, lines in _speeches(text) for line in lines if 20 <= len(line) <= 60]


def _speaker(text: str) -> Rows:
    return [
        _row(f"Who says it? {lines[0][:100]}", who)
        for who, lines in _speeches(text)
        if len(lines[0]) > 20
    ]


def _next_line(text: str) -> Rows:
    return [
        _row(f"Continue: {first}", second)
        for _, lines in _speeches(text)
        for first, second in zip(lines[::2], lines[1::2], strict=False)
    ]


def _missing_word(text: str) -> Rows:
    found = []
    for line in _lines(text)[::3]:
        words = line.split()
        place = len(line) % len(words)
        gap = " ".join("____" if i == place else word for i, word in enumerate(words))
        found.append(_row(f"Fill in: {gap}", words[place]))
    return found


def _reverse(text: str) -> Rows:
    return [
        _row(f"Backwards: {' '.join(words)}", " ".join(reversed(words)))
        for line in _lines(text)[1::7]
        if len(words := line.split()[:4]) == 4
    ]


def _spell(text: str) -> Rows:
    words = sorted({w.lower() for w in re.findall(r"[A-Za-z]{4,10}", text)})
    return [_row(f"Spell: {word}", " ".join(word)) for word in words]


def _count(text: str) -> Rows:
    return [_row(f"How many words? {line}", str(len(line.split()))) for line in _lines(text)[2::11]]


def _problems(text: str) -> list[tuple[str, str]]:
    """(question, answer) of GSM8K as the language task joins them."""
    found = []
    for block in text.split("\n\n"):
        question, _, answer = block.strip().partition("\n")
        if "####" in answer:
            found.append((question, answer))
    return found


def _answer(text: str) -> Rows:
    return [
        _row(f"Answer: {question}", answer.rpartition("####")[2].strip())
        for question, answer in _problems(text)
        if len(question) < 170
    ]


def _calculate(text: str) -> Rows:
    sums = re.findall(r"<<([0-9.+*/() -]+)=([0-9.]+)>>", text)
    return [_row(f"Calculate: {left}", right) for left, right in sums]


def _first_step(text: str) -> Rows:
    return [
        _row(f"First step: {question}", answer.split("\n")[0][:80])
        for question, answer in _problems(text)
        if len(question) < 110
    ]


TASKS: Final[Mapping[str, tuple[str, Callable[[str], Rows]]]] = {
    "calculate": ("gsm8k", _calculate),
    "answer": ("gsm8k", _answer),
    "first step": ("gsm8k", _first_step),
    "speaker": ("shakespeare", _speaker),
    "next line": ("shakespeare", _next_line),
    "missing word": ("shakespeare", _missing_word),
    "backwards": ("shakespeare", _reverse),
    "spelling": ("shakespeare", _spell),
    "word count": ("shakespeare", _count),
}


def load(split: str) -> dict[str, tuple[list[Any], list[Any]]]:
    """(training, held-out) rows by source; no text is a part of both."""
    texts = corpus.load(["gsm8k", "shakespeare"])
    if split == "development":
        texts = {name: corpus.development(text) for name, text in texts.items()}
    found = {}
    for name, (text, make) in TASKS.items():
        train, held = (
            make(part.decode("utf-8", "ignore"))
            for part in (texts[text].train, texts[text].held_out)
        )
        asked = {row["prompt"] for row in train}
        found[name] = (train, [row for row in held if row["prompt"] not in asked])
    return found
