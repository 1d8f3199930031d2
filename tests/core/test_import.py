from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sparing

HEAVY = {
    "transformers", "accelerate", "pydantic", "typer", "rich", "jinja2", "matplotlib", "yaml",
    "scipy", "lightning", "datasets", "pyarrow",
}  # fmt: skip


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """The modules that torch alone, then this package, then all of its core bring in."""
    parts = sorted(path.stem for path in (Path(sparing.__file__).parent / "core").glob("*.py"))
    core = "; ".join(f"import sparing.core.{part}" for part in parts if part != "__init__")
    code = f"""
import json, sys
import torch
torch_alone = set(sys.modules)
import sparing
package = set(sys.modules) - torch_alone
{core}
core = set(sys.modules) - torch_alone
print(json.dumps([sorted(torch_alone), sorted(package), sorted(core)]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch_alone, package, core = map(set, json.loads(out.stdout))
    return {"torch": torch_alone, "package": package, "core": core}


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_importing_the_package_costs_little_beside_torch(imported):
    assert not tops(imported["package"]) & HEAVY
    assert {name for name in imported["package"] if name.startswith("sparing")} == {"sparing"}
    assert len(imported["package"]) <= 5


def test_the_core_imports_torch_numpy_and_safetensors_only(imported):
    assert len([name for name in imported["core"] if name.startswith("sparing.core.")]) >= 10
    new = tops(imported["core"]) - tops(imported["torch"]) - sys.stdlib_module_names
    assert new <= {"sparing", "safetensors", "numpy"}


@pytest.mark.parametrize("name", [n for n in sparing.__all__ if n != "__version__"])
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(sparing, name).__name__.rpartition(".")[2] == name  # one is a module
    assert name in dir(sparing)


def test_the_version_is_a_release():
    assert sparing.__version__.count(".") == 2


def test_all_is_what_getattr_knows():
    assert set(sparing.__all__) == {*sparing._HOMES, "__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='no attribute "TopAnny"'):
        sparing.TopAnny  # noqa: B018
