"""Last projections fitted to the dense output, against plain least squares and on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.convert.dense import STORIES, load, saved
from tests.convert.test_convert_method import looked_at, setup_of
from transformers import AutoModelForCausalLM

import sparing
from sparing.convert import Conversion, convert, to_dense
from sparing.convert.reading import written
from sparing.convert.refitting import refit, ridge
from sparing.core.errors import RequestError
from sparing.core.method import Setup


def block(tokens: int, seed: int = 0) -> dict[str, Any]:
    """Five hidden units in two experts of two and one that is always on; unit -1 fills."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 5, generator=g)
    down = torch.randn(3, 5, generator=g)
    chosen = F.one_hot(torch.randint(2, (tokens,), generator=g), 2).float()
    return {
        "hidden": hidden,
        "target": hidden @ down.t(),
        "weights": chosen,
        "index": torch.tensor([[0, 1, -1], [2, 4, -1]]),
        "shared": torch.tensor([3]),
        "down": down,
        "scale": 2.0,
        "bias": None,
    }


def output(of: dict[str, Any], found: Any) -> torch.Tensor:
    """What the experts add up to, one token and one unit at a time."""
    y = torch.zeros_like(of["target"])
    for t, (h, w) in enumerate(zip(of["hidden"], of["weights"], strict=True)):
        for e, units in enumerate(of["index"].tolist()):
            for place, unit in enumerate(units):
                if unit >= 0:
                    y[t] += w[e] * h[unit] * found.down[e, :, place]
            if found.bias is not None:
                y[t] += w[e] * found.bias[e]
        for place, unit in enumerate(of["shared"].tolist()):
            y[t] += h[unit] * found.always[:, place]
    return y


def test_the_fit_is_that_of_plain_least_squares():
    """With so many tokens the pull to the start is a thousandth of each feature's power."""
    of = block(4000)
    found = refit(**of)
    columns = [
        of["weights"][:, e] * of["hidden"][:, u]
        for e, units in ((0, (0, 1)), (1, (2, 4)))
        for u in units
    ]
    features = torch.stack([*columns, of["hidden"][:, 3]], 1).double()
    best = torch.linalg.lstsq(features, of["target"].double()).solution
    expected = features @ best
    left = float((expected - of["target"]).square().mean())
    reached = float((output(of, found).double() - of["target"]).square().mean())
    assert left <= reached <= 1.001 * left + 1e-9
    assert not found.down[:, :, 2].any(), "a unit that only fills got a projection"


def test_what_all_experts_together_give_is_left_alone():
    """Where every unit is on with weight 1, the dense projections are the best there are."""
    of = block(400)
    of["weights"] = torch.ones(400, 2)
    of["scale"] = 1.0
    found = refit(**of)
    torch.testing.assert_close(output(of, found), of["target"], rtol=1e-4, atol=1e-4)
    assert torch.equal(found.always[:, 0], of["down"][:, 3])


def test_biases_are_fitted_with_them():
    of = block(2000)
    of["target"] = of["target"] + torch.tensor([3.0, -1.0, 0.5])
    without = refit(**of)
    of["bias"] = torch.zeros(2, 3)
    found = refit(**of)
    assert without.bias is None
    assert found.bias is not None
    torch.testing.assert_close(found.bias.mean(0), torch.tensor([3.0, -1.0, 0.5]), rtol=0, atol=0.1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 60), st.integers(1, 40), st.integers(0, 2**20), st.sampled_from((0.0, 1.0, 1e4))
)
def test_a_fit_is_finite_and_never_worse_on_tokens_left_out(
    tokens: int, features: int, seed: int, size: float
):
    """Fewer tokens than features, features that never occur, and none at all."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=g) * size
    x[:, 0] = 0
    y = torch.randn(tokens, 2, generator=g)
    start = torch.randn(features, 2, generator=g)
    found = ridge(x, y, start)
    assert found.isfinite().all()
    assert torch.equal(found[0], start[0])
    if tokens < 8:
        assert torch.equal(found, start)


def loss(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            total += float(F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()))
    return total / len(batches)


@pytest.fixture(scope="module")
def texts() -> list[dict[str, torch.Tensor]]:
    """Texts that no fit has seen."""
    return written(AutoModelForCausalLM.from_pretrained(STORIES), 8, 64, 77)


def test_a_real_model_starts_better_and_plain_transformers_reads_it(
    texts: list[dict[str, torch.Tensor]], tmp_path: Path
):
    """Also without biases, in a layout that knows none."""
    losses = {}
    for fitted in (False, True):
        out = tmp_path / f"out-{fitted}"
        options = Conversion(
            method="coactivation", refit=fitted, sequences=32, length=64, form="export"
        )
        made = convert(STORIES, out, options)
        assert made.checked.once is True
        assert made.checked.refitted is fitted
        losses[fitted] = loss(load(out), texts)
    assert losses[True] < losses[False] - 0.2
    told = "\n".join(made.checked.lines())
    assert "before their last projections were fitted" in told
    assert "last projections fitted" in (out / "README.md").read_text()
    back = to_dense(out, tmp_path / "back")
    assert not back.exact
    assert any("last projections" in lost for lost in back.lost)


def test_a_cut_model_starts_better(texts: list[dict[str, torch.Tensor]]):
    losses = {}
    for fitted in (False, True):
        method = sparing.Convert(
            method="cut", active=4, refit=fitted, text="own", sequences=32, length=64, seed=0
        )
        model = method.prepare(AutoModelForCausalLM.from_pretrained(STORIES), Setup(seed=0))
        losses[fitted] = loss(model, texts)
    assert losses[True] < losses[False] - 0.2


def test_only_last_projections_of_a_cut_model_change(tmp_path: Path):
    path = saved(tmp_path, "llama")
    read = looked_at(load(path))
    cut, fitted = (
        sparing.Convert(method="cut", experts=4, refit=fit).prepare(load(path), setup_of(read))
        for fit in (False, True)
    )
    theirs = fitted.state_dict()
    changed = {n for n, value in cut.state_dict().items() if not torch.equal(value, theirs[n])}
    assert changed == {n for n in theirs if n.endswith("mlp.down_proj.weight")}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "copy", "refit": True}, "refit are for parts"),
        ({"scale": "learned", "refit": True}, "learned scale"),
    ],
)
def test_what_cannot_be_fitted_is_told(options: dict[str, Any], told: str):
    with pytest.raises(RequestError, match=told):
        Conversion(**options)
