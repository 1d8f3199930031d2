"""What a pool is asked for wrongly is told in words, and leaves no trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparing.core.errors import RequestError, RunError
from sparing.pool.growth import Growth
from sparing.pool.items import Drop, Item
from sparing.pool.store import Store, check


def same(batch: Tensor) -> Tensor:
    return batch


def rows(n: int, seed: int = 0) -> Tensor:
    made = np.random.default_rng(seed).standard_normal((n, 6)).astype(np.float32)
    return torch.from_numpy(made / np.linalg.norm(made, axis=1, keepdims=True))


def pool(path: Path | None = None) -> Growth:
    made = Growth(path, encoder=same)
    made.add(rows(20))
    return made


def item(**more: Any) -> list[Item]:
    return [Item(**{"key": "a", "tensor": np.ones(6, np.float32), **more})]


LABELS = "labels are whole numbers from 0 on, or -1 without one"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.add(rows(2, 1), labels=["cat", "dog"]), "number the classes where they are"),
        (lambda p: p.add(rows(2, 1), labels=[0, float("nan")]), f"{LABELS}; number 1 is nan"),
        (lambda p: p.add(rows(2, 1), labels=torch.tensor([1.5, 1])), f"{LABELS}; number 0 is 1.5"),
        (lambda p: p.add(rows(2, 1), labels=[1, -2]), f"{LABELS}; number 1 is -2"),
        (lambda p: p.add(rows(2, 1), labels=[None, 1]), "labels are a vector of whole numbers"),
        (lambda p: p.add(rows(2, 1), labels=[[1], [1, 2]]), "labels are a vector"),
        (lambda p: p.add(rows(2, 1), labels=torch.ones(2, 3)), r"of shape \(2, 3\)"),
        (lambda p: p.add(rows(2, 1), labels=[2**70, 1]), "labels are a vector of whole numbers"),
        (lambda p: p.add(rows(2, 1), keys=[1, 2]), "keys are texts, got 1"),
        (lambda p: p.add(item(label="cat")), "a label is a whole number from 0 on"),
        (lambda p: p.add(item(label=-7)), "a label is a whole number from 0 on"),
        (lambda p: p.add(item(key=5)), "5: an item's key and text are str"),
        (lambda p: p.add(item(tensor=[1.0] * 6)), "'a': an item's key and text are str"),
        (lambda p: p.add(item(tensor=None, text=b"bytes")), "'a': an item's key and text are str"),
        (lambda p: p.add(item(tensor=None, text="words")), "gave list, which is no array"),
        (lambda p: p.add(np.array([["a"] * 6])), "holds real numbers, got <U1"),
        (lambda p: p.add(np.array([[object()] * 6])), "holds real numbers, got object"),
        (lambda p: p.add(torch.ones(2, 6, dtype=torch.complex64)), "got complex numbers"),
        (lambda p: p.add(rows(2, 1).to_sparse()), "got the layout torch.sparse_coo"),
        (lambda p: p.add(torch.ones(2, 5)), r"expected \(2, 6\): a row for each item, all of one"),
        (lambda p: p.add(None), "a batch is a tensor or items, got NoneType"),
        (lambda p: p.add(rows(2, 1), cursor=object()), "a cursor is a value of JSON"),
        (lambda p: p.add(rows(2, 1), source=""), "a source needs a name"),
        (lambda p: p.add(rows(2, 1), drops=[Drop(key="a", reason="no")]), 'unknown reason "no"'),
        (lambda p: p.forget([1.5]), "ids are a vector of whole numbers, got float64"),
        (lambda p: p.forget([True]), "ids are a vector of whole numbers, got bool"),
        (lambda p: p.forget([0, 99]), "99"),
        (lambda p: p.items([[1, 2]]), r"ids are a vector of whole numbers, got int64 of shape"),
        (lambda p: p.evict(-1), "budget must be at least 0"),
        (lambda p: p.evict(2.5), "budget must be a whole number"),
        (lambda p: p.find("outlier", faktor=2), 'unknown option "faktor"; did you mean "factor"'),
        (lambda p: p.sampler(shar=0.5), 'did you mean "share"'),
    ],
)
@pytest.mark.parametrize("disk", [False, True])
def test_a_wrong_request_is_told_and_changes_nothing(
    call: Callable[[Growth], object], message: str, disk: bool, tmp_path: Path
) -> None:
    with pool(tmp_path / "p" if disk else None) as held:
        gains, sources, report = held.gains(), held.sources(), held.report()
        with pytest.raises(RequestError, match=message):
            call(held)
        np.testing.assert_array_equal(held.gains(), gains)
        assert (held.sources(), held.report()) == (sources, report)
        assert held.add(rows(1, 9)).ids.tolist() == [20]
    if disk:
        assert check(tmp_path / "p") == []


@pytest.mark.parametrize(
    "more",
    [
        {"cursor": object()},
        {"source": ""},
        {"drops": [Drop(key="a", reason="no")]},
        {"labels": ["cat"]},
    ],
)
def test_a_wrong_first_batch_makes_no_store(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        Growth(tmp_path / "p", encoder=same).add(rows(1), **more)
    assert not (tmp_path / "p").exists()


def test_a_first_batch_of_nothing_is_no_error(tmp_path: Path) -> None:
    held = Growth(tmp_path / "p", encoder=same)
    assert held.add([]).ids.shape == held.add(torch.empty(0, 6)).ids.shape == (0,)
    held.add([], drops=[Drop(key="a", reason="unreadable", detail="a: empty")])
    held.add(rows(2))
    assert held.report()["dropped"] == {"unreadable": 1}
    held.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "exakt"}, 'did you mean "exact"'),
        ({"clean": "yes"}, "clean must be True, False or a Cleaning, got 'yes'"),
        ({"clean": None}, "clean must be True, False or a Cleaning"),
        ({"encoder": "pixel"}, 'did you mean "pixels"'),
    ],
)
def test_wrong_options_are_told_before_anything_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        Growth(tmp_path / "p", **{"encoder": same, **options})
    assert not (tmp_path / "p").exists()


def test_tensors_of_every_real_kind_are_taken() -> None:
    held = pool()
    for number, kind in enumerate((torch.bfloat16, torch.float16, torch.float64)):
        assert held.add(rows(3, 5 + number).to(kind)).ids.size == 3
    held.add(torch.arange(6).reshape(1, 6), labels=torch.tensor([True]))
    held.add(rows(2, 9).requires_grad_(), labels=np.array([3.0, -1.0]))
    assert [one.label for one in held.items(held.ids[-3:])] == [1, 3, -1]


def test_places_that_are_no_pool(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="file is a file; a pool needs a directory"):
        Growth(tmp_path / "file", encoder=same)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(RunError, match="there is no store at"):
        Growth(tmp_path / "other", encoder=same)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_closed_pool_says_so(tmp_path: Path) -> None:
    for held in (pool(), pool(tmp_path / "p")):
        held.close()
        held.close()
        for call in (lambda p: p.add(rows(1, 3)), len, lambda p: p.gains(), lambda p: p.report()):
            with pytest.raises(RequestError, match="is closed; open it again"):
                call(held)


def test_a_program_may_change_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    held = Growth("p", encoder=same)
    held.add(rows(5))
    reader = Store.open("p")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    held.add(rows(5, 1))
    held.snapshot()
    held.close()
    reader.refresh()
    assert reader.size == 10
    assert (tmp_path / "p" / "growth").is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_only_makes_opening_quick_may_fail_to_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk when the pool is closed: all is in the store, and others may write."""

    def full(*_: Any, **__: Any) -> None:
        raise RunError("no space left")

    held = pool(tmp_path / "p")
    with monkeypatch.context() as patched:
        patched.setattr("sparing.core.state.save", full)
        held.close()
    with Growth(tmp_path / "p", encoder=same) as again:
        assert len(again) == 20
