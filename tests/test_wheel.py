from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_built_wheel_runs_the_recipe_in_an_empty_environment(tmp_path):
    # nothing of this environment may reach the other one
    left_out = ("PYTHON", "VIRTUAL_ENV", "XDG_CACHE_HOME")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    clean |= {"SPARING_SMOKE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    # pip's own cache stays where it is: torch is large
    pip_cache = call(sys.executable, "-m", "pip", "cache", "dir").strip()
    clean["PIP_CACHE_DIR"] = pip_cache
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("sparing-*.whl")

    venv.create(tmp_path / "empty", with_pip=True)
    programs = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    install = (programs / "python", "-m", "pip", "install", "--quiet", "--constraint")
    constraints = ROOT / "constraints.txt"
    call(*install, constraints, "torch")
    call(*install, constraints, f"sparing[all] @ {wheel.as_uri()}")

    sparing = programs / "sparing"
    found = json.loads(call(sparing, "ls", "--json"))
    names = [entry["name"] for entry in found["recipes"]]
    assert "language-dynmoe" in names
    for method in found["methods"]:
        assert call(sparing, "card", method["name"]).startswith("# ")

    for name in names:
        summary = json.loads(call(sparing, "run", name, "--out", name, "--json"))
        assert summary["recipe"] == name
        run = tmp_path / name
        assert {entry.name for entry in run.iterdir()} >= {
            "recipe.yaml", "metrics.jsonl", "summary.json", "report.html", "checkpoint", "model",
        }  # fmt: skip
    call(
        programs / "python",
        "-c",
        "import sparing, pathlib; "
        "assert 'empty' in sparing.__file__, sparing.__file__; "
        "assert pathlib.Path(sparing.__file__).with_name('py.typed').is_file(); "
        "sparing.load('language-dynmoe/model')",
    )
