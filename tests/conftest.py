"""One smoke run of each recipe, shared by all tests that look at a finished run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class SmokeRun:
    path: Path
    stdout: str
    stderr: str


def stand_in_references(
    texts: Any, starts: Any, length: int, fingerprint: str
) -> dict[str, dict[str, float]]:
    """The form of the measured ones, which take many seconds and have tests of their own."""
    row = dict.fromkeys([*texts, "mean"], 2.0)
    return {"5-gram": row, "5-gram per domain": row, "xz": row}


@pytest.fixture
def quick_references(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparing.tasks.language import reference

    monkeypatch.setattr(reference, "references", stand_in_references)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], SmokeRun]]:
    """``smoke_run(recipe)``: what ``sparing run RECIPE --json`` left and said."""
    from typer.testing import CliRunner

    from sparing.cli import app
    from sparing.tasks.language import reference

    @functools.cache
    def made(recipe: str) -> SmokeRun:
        path = tmp_path_factory.mktemp("smoke") / recipe
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARING_SMOKE", "1")
            patch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
            patch.setattr(reference, "references", stand_in_references)
            result = CliRunner().invoke(app, ["run", recipe, "--out", str(path), "--json"])
        assert result.exit_code == 0, (result.output, result.exception)
        return SmokeRun(path, result.stdout, result.stderr)

    threads = torch.get_num_threads()
    yield made
    torch.set_num_threads(threads)
