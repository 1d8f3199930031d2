from __future__ import annotations

import copy
import random as python_random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparing.core.errors import RequestError, RunError
from sparing.weights.masks import masks
from sparing.weights.scores import fisher, grasp, iterative_snip, magnitude, random, snip, synflow

IN, OUT, RANK, CLASSES = 6, 5, 3, 4


class Low(nn.Module):
    """A frozen layer with a low-rank addition, statistics, dropout and a frozen head."""

    def __init__(self, *, zero: bool = False, seed: int = 0, rank: int = RANK) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)

        self.base = normal(OUT, IN)
        self.A = normal(rank, IN)
        self.B = nn.Parameter(torch.zeros(OUT, rank)) if zero else normal(OUT, rank)
        self.norm = nn.BatchNorm1d(OUT)
        self.drop = nn.Dropout(0.5)
        self.head = normal(CLASSES, OUT)
        self.base.requires_grad_(False)
        self.head.requires_grad_(False)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = x @ self.base.t() + x @ self.A.t() @ self.B.t()
        return self.drop(torch.tanh(self.norm(hidden))) @ self.head.t()


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {"A": model.A, "B": model.B}


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def data(*sizes: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, IN, generator=generator).to(dtype),
            torch.randint(0, CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def together(batches: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def value_at(model: nn.Module, batch: Any, **weights: Tensor) -> Tensor:
    """The loss of a copy in evaluation mode at other weights, differentiable in them."""
    plain = copy.deepcopy(model).eval()
    x, y = batch
    plain.requires_grad_(False)
    return F.cross_entropy(torch.func.functional_call(plain, weights, (x,)), y)


ALL = {
    "random": random,
    "magnitude": magnitude,
    "snip": snip,
    "iterative snip": lambda *args: iterative_snip(*args, keep=0.4, steps=3),
    "grasp": grasp,
    "grasp by differences": lambda *args: grasp(*args, product="differences"),
    "synflow": synflow,
    "synflow in steps": lambda *args: synflow(*args, keep=0.4, steps=3),
    "fisher": fisher,
    "fisher by batch": lambda *args: fisher(*args, by_sample=False),
}
every = pytest.mark.parametrize("name", ALL)
by_gradient = pytest.mark.parametrize("name", [n for n in ALL if n not in ("random", "magnitude")])


@pytest.fixture
def quiet() -> Iterator[None]:
    """Where the warning of zero factors, which has a test of its own, is expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="magnitude says nothing")
        yield


# ---- what every score keeps --------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@every
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_by_any_score_are_exact_and_drop_no_factor(name, zero, dtype):
    model = Low(zero=zero).to(dtype)
    batches = data(8, 5, dtype=dtype)
    scores = ALL[name](model, named(model), batches, loss)
    wide = torch.float64 if dtype == torch.float64 and name != "random" else torch.float32
    assert {n: (s.dtype, s.shape) for n, s in scores.items()} == {
        "A": (wide, (RANK, IN)),
        "B": (wide, (OUT, RANK)),
    }
    assert not any(s.requires_grad for s in scores.values())
    found = masks(scores, 0.4)
    assert sum(int(mask.sum()) for mask in found.values()) == round(0.4 * 33)
    # the trap: with B = 0 SNIP prunes nothing and magnitude removes all of B
    assert 0 < int(found["A"].sum()) < 18
    assert 0 < int(found["B"].sum()) < 15


@pytest.mark.usefixtures("quiet")
@every
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_and_all_generators_are_as_before(name, fails, dtype):
    model = Low(zero=True).to(dtype).train()
    model.drop.eval()
    model.A.grad = torch.ones_like(model.A)
    model.B.requires_grad_(False)
    before = {n: (t, t.data_ptr(), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    grad = model.A.grad
    loader = DataLoader(
        TensorDataset(*together(data(12, dtype=dtype))),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )
    own = loader.generator.get_state()
    states = torch.get_rng_state(), python_random.getstate()
    of_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002

    def drawing(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(3), np.random.rand(2), python_random.random()  # noqa: NPY002
        assert not model.training
        value = loss(model, batch)
        if fails:
            raise KeyboardInterrupt
        return value

    if fails and name not in ("random", "magnitude"):
        with pytest.raises(KeyboardInterrupt):
            ALL[name](model, named(model), loader, drawing)
    else:
        ALL[name](model, named(model), loader, drawing)
    after = model.state_dict(keep_vars=True)
    for n, (tensor, pointer, values) in before.items():
        assert after[n] is tensor
        assert tensor.data_ptr() == pointer
        assert tensor.dtype == values.dtype
        assert tensor.equal(values)
    assert model.A.grad is grad
    assert bool((grad == 1).all())
    assert [p.requires_grad for p in (model.A, model.B, model.base)] == [True, False, False]
    assert [m.training for m in (model, model.norm, model.drop)] == [True, True, False]
    assert loader.generator.get_state().equal(own)
    assert torch.get_rng_state().equal(states[0])
    assert python_random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == of_numpy  # noqa: NPY002


@pytest.mark.usefixtures("quiet")
@every
def test_the_same_request_gives_the_same_scores(name):
    model = Low(zero=True)
    batches = data(8, 5, dtype=torch.float32)
    first = ALL[name](model, named(model), batches, loss)
    torch.rand(5)
    model.train(not model.training)
    again = ALL[name](model, named(model), batches, loss)
    assert all(first[n].equal(again[n]) for n in first)


@pytest.mark.usefixtures("quiet")
@every
def test_half_precision_is_scored_in_float32(name):
    half = Low(zero=True).bfloat16()
    whole = copy.deepcopy(half).float()
    batches = data(6, 3, dtype=torch.bfloat16)
    widened = [(x.float(), y) for x, y in batches]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # switched off inside
        scores = ALL[name](half, named(half), batches, loss)
    expected = ALL[name](whole, named(whole), widened, loss)
    assert all(scores[n].equal(expected[n]) for n in scores)


@pytest.mark.parametrize("name", ["snip", "grasp", "grasp by differences", "iterative snip"])
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), zero=st.booleans())
@settings(max_examples=10, deadline=None)
def test_batches_of_any_sizes_give_what_one_large_batch_would(name, sizes, zero):
    model = Low(zero=zero).double()
    batches = data(*sizes)
    parts = ALL[name](model, named(model), iter(batches), loss)
    whole = ALL[name](model, named(model), [together(batches)], loss)
    for n in parts:
        torch.testing.assert_close(parts[n], whole[n], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["snip", "iterative snip", "fisher", "grasp"])
def test_gradients_too_small_for_half_precision_count(name):
    # the trap: scored under autocast without scaling, where they are rounded to zero
    model = Low().half()

    def tiny(model: nn.Module, batch: Any) -> Tensor:
        return 1e-6 * loss(model, batch)

    found = ALL[name](model, named(model), data(6, dtype=torch.float16), tiny)
    assert all(float((score != 0).float().mean()) > 0.9 for score in found.values())
    assert all(bool(score.any()) for score in found.values())


def test_a_frozen_matrix_of_the_same_shape_is_never_taken_for_a_factor():
    # the trap: masks and parameters paired by shape, so that for r == d the base was masked
    model = Low(rank=OUT)
    model.base = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)
    assert model.base.shape == model.A.shape
    before = model.base.clone()
    found = snip(model, named(model), data(9, dtype=torch.float32), loss)
    (of_a,) = torch.autograd.grad(
        value_at(
            model, data(9, dtype=torch.float32)[0], A=(A := model.A.detach().requires_grad_())
        ),
        A,
    )
    torch.testing.assert_close(found["A"], (model.A * of_a).abs().detach())
    assert model.base.equal(before)
    assert not model.base.requires_grad


def test_batches_may_be_nested_mappings():
    model = Low().double()
    x, y = together(data(5))
    batch = {"inputs": {"x": x}, "labels": [y], "note": "kept"}

    def of_mapping(model: nn.Module, batch: Any) -> Tensor:
        assert batch["note"] == "kept"
        return loss(model, (batch["inputs"]["x"], batch["labels"][0]))

    for score in (snip, fisher, synflow):
        found = score(model, named(model), [batch], of_mapping)
        plain = score(model, named(model), [(x, y)], loss)
        assert all(found[n].equal(plain[n]) for n in found)


# ---- each against a plain reference in float64 -------------------------------------------------


def test_random_is_uniform_and_by_seed():
    big = {"w": nn.Parameter(torch.zeros(300, 200)), "v": nn.Parameter(torch.zeros(50))}
    first, again, other = (random(None, big, seed=seed) for seed in (0, 0, 1))
    assert all(first[n].equal(again[n]) for n in big)
    assert not first["w"].equal(other["w"])
    assert float(first["w"].min()) >= 0
    assert float(first["w"].max()) < 1
    assert abs(float(first["w"].mean()) - 0.5) < 5 / (12 * 60_000) ** 0.5


def test_magnitude_is_the_absolute_value():
    model = Low()
    found = magnitude(model, named(model))
    assert found["A"].equal(model.A.detach().abs())
    assert found["B"].equal(model.B.detach().abs())


def test_magnitude_of_a_zero_factor_warns_and_is_drawn_by_seed():
    model = Low(zero=True)
    with pytest.warns(UserWarning, match="magnitude says nothing of B: all entries are 0"):
        found = magnitude(model, named(model), seed=1)
    with pytest.warns(UserWarning, match="magnitude says nothing of B"):
        other = magnitude(model, named(model), seed=2)
    assert found["A"].equal(other["A"])
    assert not found["B"].equal(other["B"])
    order = found["A"].reshape(-1).argsort()
    assert order.equal(model.A.detach().abs().reshape(-1).argsort())
    for score in found.values():
        torch.testing.assert_close(score.mean(), torch.tensor(1.0))


def test_snip_is_the_first_order_change_of_the_loss_when_an_entry_goes():
    model = Low().double()
    batches = data(9)
    found = snip(model, named(model), batches, loss)
    for n, weight in named(model).items():
        flat = weight.detach().reshape(-1)
        for place in range(flat.numel()):
            step = 1e-6

            def scaled(by: float, place: int = place, flat: Tensor = flat, n: str = n) -> float:
                moved = flat.clone()
                moved[place] *= by
                at = {n: moved.reshape(named(model)[n].shape)}
                return float(value_at(model, batches[0], **at))

            slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
            assert float(found[n].reshape(-1)[place]) == pytest.approx(abs(slope), abs=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_snip_of_a_zero_factor_is_its_limit(masked):
    model = Low(zero=True).double()
    batch = together(data(20))
    within = {n: torch.ones_like(p, dtype=torch.bool) for n, p in named(model).items()}
    if masked:
        within = masks(random(model, named(model), seed=2), 0.6)
    A = (model.A.detach() * within["A"]).requires_grad_()
    B = model.B.detach().clone().requires_grad_()
    product = (B @ A).detach().requires_grad_()
    eye = torch.eye(OUT, dtype=torch.float64)
    (of_b,) = torch.autograd.grad(value_at(model, batch, A=A, B=B), B)
    of_b = of_b * within["B"]
    # dL/d(BA) through a full matrix in place of A, with the identity in place of B
    (of_product,) = torch.autograd.grad(value_at(model, batch, A=product, B=eye), product)
    expected = {"A": (A * (of_b.t() @ of_product)).abs(), "B": of_b.square()}
    found = snip(model, named(model), [batch], loss, within=within if masked else None)
    for n in found:
        torch.testing.assert_close(
            found[n], (expected[n] / expected[n].mean()).detach(), rtol=2e-3, atol=2e-3
        )


def test_a_zero_factor_may_be_named_or_not():
    model = Low(zero=True).double()
    batches = data(9)
    by_itself, by_name = (
        snip(model, named(model), batches, loss, zero=zero) for zero in (None, ["B"])
    )
    assert all(by_itself[n].equal(by_name[n]) for n in by_name)
    none = snip(model, named(model), batches, loss, zero=())
    assert not any(bool(score.any()) for score in none.values())


def test_snip_within_masks_scores_the_masked_model():
    model = Low().double()
    batches = data(9)
    within = masks(random(model, named(model), seed=4), 0.5)
    found = snip(model, named(model), batches, loss, within=within)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.A.mul_(within["A"])
        masked.B.mul_(within["B"])
    expected = snip(masked, named(masked), batches, loss)
    assert all(found[n].equal(expected[n]) for n in found)
    assert all(not bool(found[n][~within[n]].any()) for n in found)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"scope": "tensor"},
        {"scope": "layer", "layer_of": lambda name: "one"},
        {"pattern": "unit", "units": {"A": ("rank", 0), "B": ("rank", 1)}},
    ],
)
def test_iterative_snip_is_the_plain_loop(zero, choice):
    model = Low(zero=zero, rank=8).double()
    batches = data(9, 4)
    found = masks(
        iterative_snip(model, named(model), batches, loss, keep=0.25, steps=3, **choice),
        0.25,
        **choice,
    )
    within = {n: torch.ones_like(p, dtype=torch.bool) for n, p in named(model).items()}
    for step in (1, 2, 3):
        scores = snip(model, named(model), batches, loss, within=within, zero=["B"] if zero else [])
        within = masks(scores, 0.25 ** (step / 3), within=within, **choice)
    assert all(found[n].equal(within[n]) for n in within)


def test_a_pattern_of_n_in_m_is_one_step():
    model = Low(rank=4).double()
    model.A = nn.Parameter(model.A.detach()[:, :4].clone())
    model.base = nn.Parameter(model.base.detach()[:, :4].clone())
    batches = [(x[:, :4], y) for x, y in data(9, 4)]
    steps = iterative_snip(model, named(model), batches, loss, keep=0.5, pattern="2:4")
    once = snip(model, named(model), batches, loss)
    kept = [masks(found, 0.5, pattern="2:4") for found in (steps, once)]
    assert all(kept[0][n].equal(kept[1][n]) for n in once)
    found = synflow(model, named(model), batches, loss, keep=0.5, pattern="2:4")
    assert bool((masks(found, 0.5, pattern="2:4")["A"].sum(1) == 2).all())


def reference_hessian_product(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """w * Hg from the full Hessian."""
    shapes = {n: p.shape for n, p in named(model).items()}
    sizes = [s.numel() for s in shapes.values()]

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        return value_at(
            model,
            batch,
            **{n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)},
        )

    flat = torch.cat([p.detach().reshape(-1) for p in named(model).values()])
    hessian = torch.autograd.functional.hessian(of_flat, flat)
    gradient = torch.autograd.functional.jacobian(of_flat, flat)
    scores = (flat * (hessian @ gradient)).split(sizes)
    return {n: s.reshape(shapes[n]) for n, s in zip(shapes, scores, strict=True)}


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient():
    model = Low().double()
    batches = data(7, 5, 2)
    expected = reference_hessian_product(model, together(batches))
    exact = grasp(model, named(model), batches, loss)
    near = grasp(model, named(model), batches, loss, product="differences")
    assert float(exact["A"].min()) < 0 < float(exact["A"].max())
    for n in expected:
        torch.testing.assert_close(exact[n], expected[n], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(near[n], expected[n], rtol=1e-5, atol=1e-8)


def test_grasp_tells_how_the_gradient_s_length_changes():
    model = Low().double()
    batch = together(data(20))
    found = grasp(model, named(model), [batch], loss)
    weights = {n: p.detach().clone() for n, p in named(model).items()}

    def square(shrunk: float) -> float:
        at = {n: w.clone().requires_grad_() for n, w in weights.items()}
        with torch.no_grad():
            at["A"][1, 2] *= 1 - shrunk
        gradients = torch.autograd.grad(value_at(model, batch, **at), list(at.values()))
        return sum(float(g.square().sum()) for g in gradients)

    slope = (square(1e-5) - square(-1e-5)) / 2e-5
    assert float(found["A"][1, 2]) == pytest.approx(-slope / 2, rel=1e-6)


def test_grasp_of_a_zero_factor():
    model = Low(zero=True).double()
    batch = together(data(20))
    at = reference_hessian_product(model, batch)["A"]
    B = model.B.detach().clone().requires_grad_()
    (of_b,) = torch.autograd.grad(value_at(model, batch, B=B), B)
    for product in ("exact", "differences"):
        found = grasp(model, named(model), [batch], loss, product=product)
        torch.testing.assert_close(found["A"], at / at.abs().mean(), rtol=1e-5, atol=1e-7)
        expected = of_b.square() / of_b.square().mean()
        torch.testing.assert_close(found["B"], expected)
    # both lose the same in sum: the flow into B, by Euler's rule for A
    torch.testing.assert_close(at.sum(), of_b.square().sum())


class Attending(nn.Module):
    """Whose fused attention has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.A, self.B = (
            nn.Parameter(torch.randn(IN, IN, generator=generator) / 2) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0).unsqueeze(0)
        return F.scaled_dot_product_attention(x @ self.A, x @ self.B, x)[0, 0, :, :CLASSES]


def test_grasp_goes_through_attention():
    model = Attending().double()
    exact, near = (
        grasp(model, named(model), data(9), loss, product=product)
        for product in ("exact", "differences")
    )
    assert bool(exact["A"].any())
    for n in exact:
        torch.testing.assert_close(exact[n], near[n], rtol=1e-5, atol=1e-8)
    single = grasp(model.float(), named(model), data(9, dtype=torch.float32), loss)
    for n in exact:
        torch.testing.assert_close(single[n].double(), exact[n], rtol=1e-3, atol=1e-6)


def test_fisher_is_the_mean_square_over_samples():
    model = Low().double()
    batches = data(4, 3)
    x, y = together(batches)
    sums = {n: torch.zeros_like(p) for n, p in named(model).items()}
    for i in range(7):
        at = {n: p.detach().clone().requires_grad_() for n, p in named(model).items()}
        value = value_at(model, (x[i : i + 1], y[i : i + 1]), **at)
        for n, gradient in zip(at, torch.autograd.grad(value, list(at.values())), strict=True):
            sums[n] += gradient.square() / 7
    found = fisher(model, named(model), batches, loss)
    single = fisher(model, named(model), [(x[i : i + 1], y[i : i + 1]) for i in range(7)], loss,
                    by_sample=False)  # fmt: skip
    for n in sums:
        torch.testing.assert_close(found[n], sums[n].detach())
        torch.testing.assert_close(single[n], sums[n].detach())
    whole = fisher(model, named(model), batches, loss, by_sample=False)
    assert float(whole["A"].sum()) < float(found["A"].sum())  # signs cancel within a batch


def trained_error(keep: dict[str, Tensor] | None, seed: int) -> tuple[float, dict[str, Tensor]]:
    """Test error of a LoRA on a low-rank change of few inputs and outputs, and SNIP's masks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    side, rank, count = 24, 6, 300
    A = nn.Parameter(normal(rank, side) / side**0.5)
    B = nn.Parameter(torch.zeros(side, rank))
    few = (torch.rand(2, side, generator=generator) < 0.4).float()
    change = (normal(side, 2) * few[0][:, None]) @ (normal(2, side) * few[1]) / side**0.5
    x, held_out = normal(count, side), normal(count, side)
    model = nn.ParameterDict({"A": A, "B": B})

    def error(model: Any, x: Tensor) -> Tensor:
        difference = 2 * x @ model["A"].t() @ model["B"].t() - x @ change.t()
        return difference.square().mean()

    both = {"A": A, "B": B}
    scored = masks(snip(model, both, [x], error), 0.4)
    used = keep or scored
    optimizer = torch.optim.Adam([A, B], lr=0.02)
    for _ in range(250):
        with torch.no_grad():
            for n, parameter in both.items():
                parameter.mul_(used[n])
        optimizer.zero_grad()
        error(model, x).backward()
        optimizer.step()
    return float(error(model, held_out).detach()), scored


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_snip_of_a_zero_factor_finds_what_matters(seed):
    error, scored = trained_error(None, seed)
    drawn = {n: torch.rand(m.shape, generator=torch.Generator().manual_seed(seed)) for n, m in
             scored.items()}  # fmt: skip
    at_random, _ = trained_error(masks(drawn, 0.4), seed)
    assert error < 0.1 * at_random


# ---- wrong requests and warnings ---------------------------------------------------------------


@by_gradient
def test_what_cannot_be_scored_is_refused(name):
    model = Low()
    with pytest.raises(RequestError, match="nothing to score"):
        ALL[name](model, {}, data(3, dtype=torch.float32), loss)
    other = {"X": nn.Parameter(torch.ones(2))}
    with pytest.raises(RequestError, match='"X" is not a parameter of the model'):
        ALL[name](model, other, data(3, dtype=torch.float32), loss)
    same = {"A": model.A, "again": model.A}
    with pytest.raises(RequestError, match="two of A, again are one parameter"):
        ALL[name](model, same, data(3, dtype=torch.float32), loss)
    if not name.startswith("synflow"):
        with pytest.raises(RequestError, match="no batch to score by"):
            ALL[name](model, named(model), [], loss)
        batches = data(3, 3, dtype=torch.float32)
        batches[1][0][0, 0] = float("nan")
        with pytest.raises(RunError, match="loss of scoring batch 1 is nan"):
            ALL[name](model, named(model), batches, loss)
        with pytest.raises(RequestError, match="must give one number"):
            ALL[name](model, named(model), data(3, dtype=torch.float32), lambda m, b: m(b[0]))
        with pytest.raises(RequestError, match="depends on none of the parameters"):
            ALL[name](model, named(model), data(3, dtype=torch.float32), lambda m, b: b[0].sum())


@pytest.mark.parametrize("score", [random, magnitude])
def test_nothing_to_score_is_refused_without_data_too(score):
    with pytest.raises(RequestError, match="nothing to score"):
        score(None, {})


def test_a_broken_gradient_is_refused_by_name():
    model = Low().double()

    def root(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) + (model.A - model.A.detach()).square().sum().sqrt()

    with pytest.raises(RequestError, match='scores of "A" are not finite'):
        snip(model, named(model), data(4), root)


def test_a_parameter_that_the_loss_does_not_reach_is_warned_of():
    model = Low().double()
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with pytest.warns(UserWarning, match="does not depend on unused: the scores there are 0"):
        found = snip(model, {**named(model), "unused": model.unused}, data(4), loss)
    assert found["unused"].tolist() == [0, 0]


def test_zero_factors_without_any_gradient_are_refused():
    model = Low(zero=True).double()
    with torch.no_grad():
        model.A.zero_()
    with pytest.raises(RequestError, match="A, B are all zero and so are their gradients"):
        snip(model, named(model), data(4), loss)
    with pytest.raises(RequestError, match='zero names "C"'):
        snip(model, named(model), data(4), loss, zero=["C"])
    within = {"A": torch.ones(RANK, IN, dtype=torch.bool)}
    with pytest.raises(RequestError, match=r'within has no mask.*of "B"'):
        snip(model, named(model), data(4), loss, within=within)


def test_fisher_refuses_batches_that_do_not_come_apart():
    model = Low().double()
    ((x, y),) = data(4)
    with pytest.raises(RequestError, match="cannot be taken apart by sample"):
        fisher(model, named(model), [(x, y[:3])], loss)


def test_an_unknown_product_is_refused():
    model = Low()
    with pytest.raises(RequestError, match='unknown product "exakt"; did you mean "exact"'):
        grasp(model, named(model), data(3), loss, product="exakt")
