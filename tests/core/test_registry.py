from __future__ import annotations

import subprocess
import sys

import pytest

from sparing.core import registry
from sparing.core.errors import RequestError
from sparing.core.registry import Record


@pytest.mark.parametrize("kind", ["method", "task"])
def test_names_are_unique_and_described(kind):
    records = registry.records(kind)
    known = [n for r in records for n in {r.name.lower(), r.class_name.lower()}]
    assert len(known) == len(set(known))
    for record in records:
        assert record.summary.endswith(".")
        assert len(record.summary) <= 100
        assert record.target.startswith("sparing.")
        assert ":" in record.target


@pytest.mark.parametrize("name", ["dynmoe", "DynMoE", "TopAny", "topany"])
def test_a_method_is_found_by_either_name_in_any_case(name):
    assert registry.method_record(name).target == "sparing.experts.top_any:TopAny"


def test_methods_have_papers_and_cards():
    for record in registry.methods():
        assert record.paper.startswith("arXiv ")
        assert record.card


@pytest.mark.parametrize("record", registry.methods(), ids=lambda r: r.name)
def test_methods_load_and_know_their_own_name(record):
    cls = registry.method(record.name)
    assert cls.name == record.name
    assert cls.__name__ == record.class_name


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(RequestError, match='unknown method "dynmo"; did you mean "dynmoe"'):
        registry.method("dynmo")
    with pytest.raises(RequestError, match='unknown task "langage"; did you mean "language"'):
        registry.task("langage")
    with pytest.raises(RequestError, match='unknown kind "methods"; did you mean "method"'):
        registry.records("methods")


def test_a_missing_extra_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "needs_it.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    record = Record(name="x", target="needs_it:X", summary="X.", extras=("hf", "report"))
    with pytest.raises(RequestError, match=r'"surely_not_installed".*pip install "sparing\[hf,rep'):
        record.load()
    with pytest.raises(ModuleNotFoundError):
        Record(name="x", target="needs_it:X", summary="X.").load()


def test_a_module_of_ours_that_is_missing_is_a_defect_and_not_an_extra():
    record = Record(name="x", target="sparing.no_such_module:X", summary="X.", extras=("hf",))
    with pytest.raises(ModuleNotFoundError):
        record.load()


def test_a_target_that_is_no_class_is_a_defect():
    with pytest.raises(TypeError, match="is not a class"):
        Record(name="x", target="sparing.core.registry:methods", summary="X.").load()


def test_listing_imports_no_method():
    code = (
        "import sys; from sparing.core import registry; "
        "[(r.name, r.summary) for r in registry.methods() + registry.tasks()]; "
        "registry.method_record('dynmoe'); registry.task_record('language'); "
        "print([m for m in sys.modules if m.startswith('sparing.')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sparing.core.registry" in out.stdout
    assert "sparing.experts" not in out.stdout
    assert "sparing.tasks" not in out.stdout
