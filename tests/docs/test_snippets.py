"""Everything that the README and the docs show as code runs, as it stands there.

Python blocks of one file share a namespace, in order. A block that cannot run here carries
``<!-- not run: why -->`` on the line before it, and is counted. The ``sparing`` command lines of
the README run in order in one folder, with the recipes' smoke settings (SPARING_SMOKE=1).
"""

from __future__ import annotations

import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
NOT_RUN = re.compile(r"^ *<!-- not run: *(?P<reason>.*?) *-->$")
SHELLS = ("bash", "console", "sh", "shell")


@dataclass(frozen=True)
class Block:
    """A fenced block: its code starts on ``line`` (from 1); ``not_run`` is the reason or None."""

    language: str
    line: int
    code: str
    not_run: str | None = None


def parse(text: str) -> list[Block]:
    blocks: list[Block] = []
    lines = text.splitlines()
    reason: str | None = None
    at = 0
    while at < len(lines):
        opening, comment = FENCE.match(lines[at]), NOT_RUN.match(lines[at])
        at += 1
        if comment:
            reason = comment["reason"]
        elif opening:
            start, indent = at, len(opening["indent"])
            closing = re.compile(rf" *{opening['fence'][0]}{{{len(opening['fence'])},}} *$")
            while not closing.match(lines[at]):
                at += 1
                if at == len(lines):
                    raise ValueError(f"the block opened on line {start} is never closed")
            code = "\n".join(
                line[min(indent, len(line) - len(line.lstrip())) :] for line in lines[start:at]
            )
            blocks.append(Block(opening["language"], start + 1, code + "\n", reason))
            reason = None
            at += 1
        elif lines[at - 1].strip():
            reason = None
    return blocks


def commands(block: Block) -> list[str]:
    """The command lines of a shell block: after ``$ `` where it shows output too, else all."""
    lines = block.code.replace("\\\n", " ").splitlines()
    shown = [line for line in lines if line.startswith("$ ")]
    return [line.removeprefix("$ ") for line in shown] if shown else lines


def sparing(line: str) -> list[str] | None:
    """The arguments if the line calls ``sparing``, else None."""
    words = shlex.split(line, comments=True)
    if words and Path(words[0]).name == "sparing":
        return words[1:]
    return words[3:] if words[:3] == ["python", "-m", "sparing"] else None


def blocks_of(path: Path) -> list[Block]:
    return parse(path.read_text(encoding="utf-8")) if path.exists() else []


DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if blocks_of(path))


def python_of(path: Path) -> list[Block]:
    return [block for block in blocks_of(path) if block.language == "python" and not block.not_run]


@pytest.mark.parametrize(
    "path", [README, *DOCS], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert path.exists(), f"{path.name} is missing"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARING_SMOKE", "1")
    # a real module, so that classes in snippets find the names of their annotations
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in python_of(path):
        # leading newlines make tracebacks point into the page
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)


def test_command_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from sparing.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARING_SMOKE", "1")
    ran = 0
    for block in blocks_of(README):
        if block.language not in SHELLS or block.not_run:
            continue
        for line in commands(block):
            arguments = sparing(line)
            if arguments is None:
                continue
            odd = {"|", "&&", ";", ">", "&"} & set(arguments)
            assert not odd, f"README line {block.line}: {line!r} needs a shell for {odd}"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (
                f"README line {block.line}: {line!r} ended with {result.exit_code}\n"
                f"{result.output}\n{result.exception!r}"
            )
            ran += 1
    assert ran > 0, "the README shows no sparing command"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = [
        word
        for block in blocks_of(README)
        if block.language in SHELLS
        for line in commands(block)
        for word in shlex.split(line, comments=True)[1:]
        if line.startswith("make ") and "=" not in word and not word.startswith("-")
    ]
    assert "demo" in shown
    assert [word for word in shown if not re.search(rf"^{word}:", makefile, re.M)] == []


def test_the_readme_and_every_card_show_code_that_runs() -> None:
    cards = sorted((ROOT / "docs" / "methods").glob("*.md"))
    assert cards, "there is no method card"
    assert [page.name for page in (README, *cards) if not python_of(page)] == []


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    blocks = [block for page in (README, *DOCS) for block in blocks_of(page)]
    python = [block for block in blocks if block.language == "python"]
    left_out = [block for block in python if block.not_run is not None]
    assert all(block.not_run for block in blocks if block.not_run is not None), "give a reason"
    assert len(left_out) <= len(python) // 4, [block.not_run for block in left_out]


# ---- the reader of pages itself ------------------------------------------------------------------

PAGE = """\
# Title
```python
x = 1
```
<!-- not run: needs two machines -->

```python
raise SystemExit
```
<!-- not run: this comment stands before a sentence -->
A sentence.

- a list

  ~~~python
  def f():
      return "```"

  ~~~
````console
$ sparing ls --json  # all of them
{"methods": []}
$ sparing run \\
    x -s a=1
````
```bash
make demo
sparing plan "a b"
.venv/bin/sparing card x
python -m sparing ls
```
"""


def test_reading_blocks() -> None:
    blocks = parse(PAGE)
    assert [(b.language, b.line, b.not_run) for b in blocks] == [
        ("python", 3, None),
        ("python", 8, "needs two machines"),
        ("python", 16, None),
        ("console", 21, None),
        ("bash", 27, None),
    ]
    assert blocks[2].code == 'def f():\n    return "```"\n\n'
    assert [sparing(line) for line in commands(blocks[3])] == [
        ["ls", "--json"],
        ["run", "x", "-s", "a=1"],
    ]
    assert [sparing(line) for line in commands(blocks[4])] == [
        None,
        ["plan", "a b"],
        ["card", "x"],
        ["ls"],
    ]


def test_a_block_that_is_never_closed_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2 is never closed"):
        parse("text\n```python\nx = 1\n")
