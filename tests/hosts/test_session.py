from __future__ import annotations

import copy
import random
from typing import Any, final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import (
    ADAM,
    SAMPLES,
    SGD,
    NoOptions,
    Recorder,
    Rows,
    Whole,
    language_session,
    linear,
    restless,
    session,
    small,
    squares,
    train,
)

import sparing
from sparing.core import state
from sparing.core.errors import RequestError, RunError
from sparing.core.method import Method, Plan


class Toy(Method):
    """A base for methods of one test."""

    name = "toy"
    Options = NoOptions


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# ---- the plain loop ------------------------------------------------------------------------------


def test_without_methods_it_is_the_plain_loop_bit_for_bit():
    plain = small()
    optimizer = SGD(plain.parameters())
    data = Whole()
    torch.manual_seed(5)
    expected = []
    for epoch in range(2):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(3):
            loss = squares(plain, data.batch(index))[0].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    torch.manual_seed(5)
    whole = session(batch_size=3, epochs=2)
    assert train(whole) == expected
    assert same(whole.unwrapped.state_dict(), plain.state_dict())
    assert (whole.clock.step, whole.clock.epoch, whole.clock.samples) == (8, 2, 20)


def test_losses_may_be_computed_in_the_loop():
    torch.manual_seed(5)
    given = session(epochs=2)
    expected = train(given)
    torch.manual_seed(5)
    own = session(epochs=2, losses=None)
    found = []
    for batch, context in own:
        outputs = own.model(batch["x"])[:, 0]
        found.append(own.step((outputs - batch["y"]).square(), context, outputs))
    assert found == expected
    assert same(own.unwrapped.state_dict(), given.unwrapped.state_dict())
    # what needs losses(model, batch) is left out, and said where it is asked for
    assert given.ledger.spent("flops") > 0
    assert own.ledger.spent("flops") == 0
    with pytest.raises(RequestError, match="no losses"):
        own.forward(batch)


def test_the_account_counts_samples_tokens_flops_and_parameters():
    whole = session(model=linear(), epochs=2, batch_size=4)
    train(whole)
    # 3 weights: forward and the weights' gradient; the input needs none
    assert whole.account().to_dict() == {
        "samples": {"spent": 20, "dense": 20},
        "tokens": {"spent": 20, "dense": 20},
        "flops": {"spent": 20 * 2 * 3 * 2, "dense": 20 * 2 * 3 * 2},
        "parameters": {"spent": 4, "dense": 4},
    }


def test_tokens_are_those_of_the_mask():
    class Padded:
        def __len__(self) -> int:
            return 4

        def batch(self, index: Tensor) -> dict[str, Tensor]:
            real = torch.arange(5) <= index[:, None]
            return {"input_ids": torch.zeros(len(index), 5).long(), "attention_mask": real.int()}

    recorder = Recorder()
    whole = session(recorder, data=Padded(), losses=None, model=linear(), batch_size=4)
    for _, context in whole:
        assert context.mask.dtype == torch.bool
        assert context.mask.sum(1).tolist() == (context.index[:, 0] + 1).tolist()
        whole.step(whole.model(torch.ones(4, 3))[:, 0], context)
    assert whole.clock.tokens == whole.ledger.spent("tokens") == 1 + 2 + 3 + 4
    assert recorder.context.mask is context.mask

    unmasked = language_session(steps=1)
    train(unmasked)
    assert unmasked.clock.tokens == 2 * 8


# ---- accumulation, budgets, schedule, clipping ---------------------------------------------------


def test_a_shorter_last_group_of_an_accumulation_is_a_mean_too():
    order = torch.arange(SAMPLES)
    whole = session(
        model=linear(), batch_size=2, accumulate=2, epochs=2, order=lambda _epoch, _generator: order
    )
    train(whole)
    assert whole.clock.step == 2 * 3  # groups of 2, 2 and 1 micro-batches
    plain, data = linear(), Whole()
    optimizer = SGD(plain.parameters())
    for _ in range(2):
        for index in order.split(4):
            optimizer.zero_grad()
            squares(plain, data.batch(index))[0].mean().backward()
            optimizer.step()
    for mine, theirs in zip(whole.unwrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("budget", "steps", "epochs", "samples"),
    [
        ({"epochs": 3}, 6, 3, 30),
        ({"steps": 3}, 3, 1, 16),
        ({"steps": 4}, 4, 2, 20),
        ({"epochs": 1, "steps": 5}, 2, 1, 10),
        ({"epochs": 4, "steps": 5}, 5, 2, 26),
    ],
)
def test_budgets_and_the_end_of_the_schedule(budget, steps, epochs, samples):
    asked = []

    def schedule(done: float) -> float:
        asked.append(done)
        return 1 - done / 2

    whole = session(batch_size=3, accumulate=2, schedule=schedule, **budget)
    assert not whole.finished
    rates = []
    train(whole, after=lambda: rates.append(whole.optimizer.param_groups[0]["lr"]))
    clock = whole.clock
    assert whole.finished
    assert (clock.step, clock.epoch, clock.samples) == (steps, epochs, samples)
    assert (clock.steps, clock.fraction) == (steps, 1.0)
    assert asked == [step / steps for step in range(steps)]
    assert rates[-1] == pytest.approx(0.01 * (1 - (steps - 1) / steps / 2))
    assert train(whole) == []  # nothing is left


def test_a_loop_that_was_left_goes_on_where_it_stood():
    torch.manual_seed(5)
    whole = session(epochs=2)
    expected = train(whole)
    torch.manual_seed(5)
    parts = session(epochs=2)
    assert train(parts, until=3) + train(parts, until=6) + train(parts) == expected


def test_batches_may_be_passed_over():
    whole = session(epochs=2)
    seen = 0
    for batch, context in whole:
        seen += 1
        if seen % 5 == 0:
            continue
        losses, outputs = whole.forward(batch)
        whole.step(losses, context, outputs)
    assert (seen, whole.clock.epoch, whole.clock.step) == (10, 2, 8)


def test_clipping_comes_after_the_grads_seam():
    @final
    class Louder(Toy):
        def grads(self, named_parameters: Any, context: Any) -> None:
            for _, p in named_parameters:
                p.grad *= 1000

    louder = Louder()
    recorder = Recorder()
    model = linear()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = lambda groups: torch.optim.SGD(groups, lr=1.0)  # noqa: E731
    whole = session(louder, recorder, model=model, clip=0.5, steps=1, optimizer=optimizer)
    train(whole)
    moved = sum(
        float((p.detach() - old).square().sum())
        for p, old in zip(whole.unwrapped.parameters(), before, strict=True)
    )
    assert moved**0.5 == pytest.approx(0.5, rel=1e-4)
    assert recorder.norm > 50


# ---- seams ---------------------------------------------------------------------------------------


def test_seams_are_called_in_the_documented_order():
    recorder = Recorder()
    whole = session(recorder, data=Whole(5), accumulate=2, seed=7, precision="bf16")
    train(whole)
    assert recorder.calls == [
        "prepare", "optimizer", "bind", "order",
        "batch", "loss", "batch", "loss", "grads", "step 1", "account",
        "batch", "loss", "grads", "step 2", "account",
        "step 2 ends the epoch",
    ]  # fmt: skip
    setup, bound = recorder.setup, recorder.bound
    assert (setup.seed, setup.steps, setup.dtype) == (7, 2, torch.bfloat16)
    assert (bound["size"], bound["epochs"], bound["steps"], bound["seed"]) == (5, 1, 2, 7)
    assert bound["model"] is whole.unwrapped
    assert whole.ledger.to_dict()["bytes"] == {"spent": 2, "dense": 4}
    assert whole.signals() == {"recorder": {"calls": 17}}
    assert whole.take_events() == [{"method": "recorder", "kind": "looked"}]


def test_loss_terms_come_before_weights_before_the_mean_before_the_rest():
    class Term(Toy):
        def loss(self, losses: Tensor, context: Any, outputs: Any) -> Tensor:
            assert losses.shape == (2,)
            return losses + outputs

    class Weight(Toy):
        loss_stage = "weight"

        def loss(self, losses: Tensor, context: Any, outputs: Any) -> Tensor:
            return losses * torch.tensor([0.0, 4.0])

    class Rest(Toy):
        loss_stage = "batch"

        def loss(self, losses: Tensor, context: Any, outputs: Any) -> Tensor:
            assert losses.ndim == 0
            return losses + 100

    methods = []
    for kind in (Rest, Weight, Term):
        kind.name = kind.__name__.lower()
        methods.append(kind())
    whole = session(*methods, dry_run=False)
    _, context = next(iter(whole))
    losses = torch.tensor([1.0, 2.0])
    assert float(whole.loss(losses, context, torch.tensor([10.0, 20.0]))) == (22 * 4) / 2 + 100
    with pytest.raises(RequestError, match=r"one value for each sample.*\(2, 1\)"):
        whole.loss(losses[:, None], context)


def test_a_method_may_plan_and_its_weights_travel_with_the_samples():
    class Planner(Toy):
        def order(self, clock: Any) -> Plan:
            index = torch.tensor([9, 3, 4, 1, 0])
            return Plan(index, index / 10)

    for data in (Whole(), Rows()):
        whole = session(Planner(), data=data, losses=None)
        seen = []
        for batch, context in whole:
            assert batch["x"][:, 0].tolist() == context.index[:, 0].tolist()
            torch.testing.assert_close(context.weight, context.index[:, 0] / 10)
            assert context.share.eq(1).all()
            seen += context.index[:, 0].tolist()
            whole.step(whole.model(batch["x"])[:, 0], context)
        assert seen == [9, 3, 4, 1, 0]

    class Other(Planner):
        name = "other"

    with pytest.raises(RequestError, match="more than one method plans"):
        session(Planner(), Other())

    class Nothing(Toy):
        def order(self, clock: Any) -> Plan:
            return Plan(torch.empty(0, dtype=torch.int64))

    with pytest.raises(RunError, match="has 0 samples"):
        train(session(Nothing(), steps=3, dry_run=False))


def test_conflicts_duplicates_and_circles():
    class One(Toy):
        name = "one"
        conflicts = {"two": "both move the sun"}  # noqa: RUF012

    class Two(Toy):
        name = "two"
        after = ("three",)

    class Three(Toy):
        name = "three"
        after = ("two",)

    for methods, message in (
        ([Recorder(), Recorder()], '"recorder" is attached twice'),
        ([Two(), One()], '"one" cannot work beside "two": both move the sun'),
        ([Two(), Three()], "form a circle: two, three"),
    ):
        with pytest.raises(RequestError, match=message):
            session(*methods)
    Three.after = ()
    assert [m.name for m in session(Two(), Three()).methods] == ["three", "two"]


def test_the_probe_is_the_mean_loss_of_a_few_rows_of_recent_batches():
    recorder = Recorder()
    whole = session(recorder, batch_size=5, steps=2)
    batches = []
    for batch, context in whole:
        batches.append(batch)
        losses, outputs = whole.forward(batch)
        whole.step(losses, context, outputs)
        before = copy.deepcopy(whole.unwrapped.state_dict())
        found = recorder.bound["probe"]()
        model = whole.unwrapped.eval()
        rows = [{key: value[:4] for key, value in batch.items()} for batch in batches]
        expected = torch.stack([squares(model, part)[0].mean() for part in rows]).mean()
        model.train()
        assert same(found, expected.detach())
        assert not found.requires_grad
        assert whole.model.training
        assert same(whole.unwrapped.state_dict(), before)
    assert session(Recorder(), losses=None).methods[0].bound["probe"] is None


def test_evaluating_enters_the_methods_and_leaves_as_it_came():
    recorder = Recorder()
    whole = session(recorder)
    whole.model.train()
    with whole.evaluating() as model:
        assert recorder.calls[-1] == "evaluating"
        assert not model.training
        assert not model(torch.ones(2, 3)).requires_grad
    assert recorder.calls[-1] == "evaluated"
    assert whole.model.training


# ---- the dry run ---------------------------------------------------------------------------------


class Careless(Recorder):
    """Draws from all global generators, and changes itself, in every seam."""

    name = "careless"

    def _note(self) -> float:
        self.score = getattr(self, "score", 0.0) + random.random()
        return float(torch.rand(())) + np.random.rand()  # noqa: NPY002

    def batch(self, batch: Any, context: Any) -> Any:
        self._note()
        return super().batch(batch, context)

    def loss(self, losses: Tensor, context: Any, outputs: Any) -> Tensor:
        return super().loss(losses * self._note(), context, outputs)

    def step(self, clock: Any, optimizer: Any) -> None:
        self._note()
        clock.tokens += 1000  # no method may, but nor may it show
        super().step(clock, optimizer)


def test_the_dry_run_leaves_everything_as_it_was():
    model, method = small(), Careless()
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = (torch.rand(3), random.random(), np.random.rand())  # noqa: NPY002
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    whole = session(method, model=model)
    found = (torch.rand(3), random.random(), np.random.rand())  # noqa: NPY002
    assert same(found, expected)
    assert same(whole.unwrapped.state_dict(), weights)
    assert all(p.grad is None for p in model.parameters())
    assert method.calls == ["prepare", "optimizer", "bind"]
    assert not hasattr(method, "score")
    assert whole.clock == sparing.Clock(steps=5, epochs=1)
    assert set(whole.ledger.to_dict()) == {"parameters"}
    assert whole.optimizer.state_dict()["state"] == {}


def test_with_experts_the_dry_run_changes_no_bit():
    torch.manual_seed(4)
    tried = language_session(restless())
    expected = train(tried)
    torch.manual_seed(4)
    untried = language_session(restless(), dry_run=False)
    assert train(untried) == expected
    assert same(untried.state_dict(), tried.state_dict())


def test_the_dry_run_goes_through_every_seam():
    for seam in ("order", "batch", "loss", "grads", "step", "account"):

        class Broken(Toy):
            pass

        def fail(*_: Any, seam: str = seam) -> None:
            raise ZeroDivisionError(seam)

        setattr(Broken, seam, fail)
        with pytest.raises(ZeroDivisionError, match=seam):
            session(Broken())
        session(Broken(), dry_run=False)
        session(Broken(), losses=None)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda m, b: (squares(m, b)[0].mean(), None), r"each of the 2 samples, got shape \(\)"),
        (lambda m, b: (m(b["x"]), None), r"got shape \(2, 1\).*reduction=\"none\""),
        (lambda m, b: (squares(m, b)[0][:1], None), r"got shape \(1,\)"),
        (lambda m, b: (squares(m, b)[0] * torch.nan, None), r"not finite: \[nan, nan\]"),
    ],
)
def test_the_dry_run_catches_losses_that_cannot_be_right(losses, message):
    with pytest.raises(RequestError, match=message):
        session(losses=losses)


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [1, 5, 6, 9])
def test_resumed_in_mid_epoch_is_bit_identical(tmp_path, until):
    def build() -> sparing.Session:
        return session(Recorder(), epochs=4, batch_size=2, accumulate=2, optimizer=ADAM, clip=1.0)

    torch.manual_seed(8)
    whole = build()
    expected = train(whole)

    torch.manual_seed(8)
    killed = build()
    losses = train(killed, until=until)
    state.save(tmp_path / "state", killed.state_dict())
    torch.manual_seed(99)
    resumed = build()
    resumed.load_state_dict(state.load(tmp_path / "state"))
    assert resumed.clock.step == until
    assert losses + train(resumed) == expected
    assert same(resumed.state_dict(), whole.state_dict())
    assert resumed.account() == whole.account()


@pytest.mark.parametrize("until", [5, 8])
def test_resumed_with_experts_is_bit_identical(tmp_path, until):
    def build() -> sparing.Session:
        return language_session(restless(), accumulate=2, schedule=lambda done: 1 - done)

    torch.manual_seed(8)
    whole = build()
    expected = train(whole)
    assert whole.signals()["dynmoe"]["updates"] > 3

    torch.manual_seed(8)
    killed = build()
    losses = train(killed, until=until)
    state.save(tmp_path / "state", killed.state_dict())
    resumed = build()
    resumed.load_state_dict(state.load(tmp_path / "state"))
    assert losses + train(resumed) == expected
    assert same(resumed.state_dict(), whole.state_dict())
    assert resumed.signals() == whole.signals()
    assert resumed.account() == whole.account()


def test_state_that_does_not_fit():
    saved = session(Recorder()).state_dict()
    with pytest.raises(RequestError, match=r"methods \['recorder'\], this session has \[\]"):
        session().load_state_dict(saved)
    whole = session(accumulate=2)
    batch, context = next(iter(whole))
    losses, outputs = whole.forward(batch)
    whole.step(losses, context, outputs)
    with pytest.raises(RequestError, match="1 of 2 micro-batches are accumulated"):
        whole.state_dict()


# ---- what can go wrong ---------------------------------------------------------------------------


class Poison(Toy):
    """Spoils one thing at the third step."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.steps = where, 0

    def step(self, clock: Any, optimizer: Any) -> None:
        self.steps = clock.step

    def loss(self, losses: Tensor, context: Any, outputs: Any) -> Tensor:
        return losses * torch.nan if self.where == "term" and self.steps == 2 else losses

    def grads(self, named_parameters: Any, context: Any) -> None:
        if self.where == "gradient" and self.steps == 2:
            next(iter(named_parameters))[1].grad[0] = torch.inf


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("losses", "the loss is not finite"),
        ("term", "the loss with the methods' terms is not finite"),
        ("gradient", "the gradient is not finite"),
    ],
)
def test_what_is_not_finite_stops_before_the_optimizer(where, what):
    order = torch.arange(SAMPLES)
    whole = session(
        Poison(where),
        model=linear(),
        optimizer=ADAM,
        clip=1.0,
        order=lambda _epoch, _generator: order,
        domain_of=lambda index: index // 5,
        domains=("prose", "verse"),
    )
    before: dict[str, Any] = {}

    def train_on() -> None:
        for batch, context in whole:
            losses, outputs = whole.forward(batch)
            if whole.clock.step == 2:
                before.update(copy.deepcopy(whole.state_dict()))
                if where == "losses":
                    losses[1] = torch.nan
            whole.step(losses, context, outputs)

    with pytest.raises(RunError) as caught:
        train_on()
    message = str(caught.value)
    assert f"{what} at step 3" in message
    assert "the optimizer was not stepped" in message
    assert ("(samples [5] of verse)" if where == "losses" else "samples [4, 5] of prose") in message
    assert same(whole.unwrapped.state_dict(), before["model"])
    assert same(whole.optimizer.state_dict(), before["optimizer"])
    assert whole.clock.step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "needs an end"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"precision": "fp8"}, 'precision must be "fp32" or "bf16", got "fp8"'),
        ({"data": []}, "the data set is empty"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(RequestError, match=message):
        session(**options)


def test_a_step_outside_the_loop_is_refused():
    whole = session()
    context = sparing.Context.of(torch.tensor([0, 1]))
    with pytest.raises(RequestError, match="inside the loop"):
        whole.step(torch.ones(2, requires_grad=True), context)


# ---- precision -----------------------------------------------------------------------------------


def test_bf16_is_autocast_and_weights_stay_fp32():
    dtypes = []

    def losses(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        outputs = model(batch["x"])
        dtypes.append(outputs.dtype)
        return (outputs[:, 0].float() - batch["y"]).square(), outputs

    whole = session(precision="bf16", losses=losses)
    dtypes.clear()
    assert all(np.isfinite(train(whole)))
    # the count of FLOPs needs no precision; training has it
    assert torch.bfloat16 in dtypes
    with whole.evaluating() as model:
        assert losses(model, Whole().batch(torch.arange(2)))[1].dtype == torch.bfloat16
    assert {p.dtype for p in whole.unwrapped.parameters()} == {torch.float32}
    moments = whole.optimizer.state_dict()["state"].values()
    assert all(
        t.dtype == torch.float32 for entry in moments for t in entry.values() if t is not None
    )


def test_bf16_with_experts():
    whole = language_session(restless(), precision="bf16", steps=4)
    assert all(np.isfinite(train(whole)))
    assert {p.dtype for p in whole.unwrapped.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_state_of_weights_with_channels_last_is_laid_out_as_they_are(kind):
    from sparing.hosts.layout import lay_out_like_parameters_

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.default_generator.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.1, fused=True, **options)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        torch.autograd.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    with torch.random.fork_rng():
        (model, optimizer), (other, resumed) = made(), made()
        x = torch.randn(5, 3, 6, 6)
    step(model, optimizer, x)
    other.load_state_dict(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    for held in saved["state"].values():  # as a file gives them back
        held |= {k: v.clone(memory_format=torch.contiguous_format) for k, v in held.items()
                  if isinstance(v, torch.Tensor)}  # fmt: skip
    resumed.load_state_dict(saved)
    lay_out_like_parameters_(resumed)
    step(model, optimizer, x)
    step(other, resumed, x)
    assert torch.equal(model.weight, other.weight)
