from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightnings import Module, fit, loader, trainer
from pruning import Classifier, Points, Prune, Sentences
from test_session import same
from torch import nn
from toys import Recorder, llama, restless

import sparing
from sparing.core.errors import RequestError, RunError

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def trained(path: Path, *methods: Any, **options: Any) -> tuple[Any, Module, L.Trainer]:
    of_module = {key: options.pop(key) for key in ("model", "rate") if key in options}
    data, loading = options.pop("data", None), options.pop("loading", {})
    attached = sparing.LightningMethods(methods)
    module, made = Module(attached, **of_module), trainer(path, attached, **options)
    fit(made, module, loader(data, **loading), loader(Points(4), shuffle=False))
    return attached, module, made


# ---- doing nothing -------------------------------------------------------------------------------


def test_without_methods_it_is_plain_lightning_bit_for_bit(tmp_path):
    plain = Module(model=Classifier(dropout=0.0))
    fit(trainer(tmp_path), plain, loader(shuffle=False))
    attached, module, _ = trained(
        tmp_path, model=Classifier(dropout=0.0), loading={"shuffle": False}
    )
    assert same(module.state_dict(), plain.state_dict())
    assert module.rates == plain.rates
    assert module.seen == plain.seen
    assert attached.clock.step == 4 * 7


# ---- plans, accumulation, the rate ---------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
def test_epochs_are_as_long_as_their_plans_and_the_rate_ends_at_zero(tmp_path, accumulate):
    method = Prune(ratio=0.7)
    attached, module, made = trained(
        tmp_path, method, max_epochs=5, accumulate_grad_batches=accumulate
    )
    lengths = method.lengths
    assert lengths[0] == lengths[-1] == 26
    assert max(lengths[1:-1]) < 26
    assert [len(set(seen)) for seen in method.seen] == lengths
    # the batches that Lightning trained on are those of the contexts
    assert list(chain(*module.seen)) == list(chain(*method.seen))
    steps = [-(micro // -accumulate) for micro in (-(n // -4) for n in lengths)]
    assert made.global_step == attached.clock.step == sum(steps)
    assert method.ended == [sum(steps[: e + 1]) for e in range(5)]
    total = 5 * -(-7 // accumulate)
    places = [(e + k / n) / 5 for e, n in enumerate(steps) for k in range(n)]
    assert module.rates == pytest.approx(
        [0.1 * (1 - int(total * p + 0.5 + 1e-9) / total) for p in places]
    )
    assert made.optimizers[0].param_groups[0]["lr"] == 0
    # validation ends every epoch, also those that are shorter than the first
    assert module.validated == [0, 1, 2, 3, 4]
    assert attached.account().to_dict()["samples"] == {"spent": sum(lengths), "dense": 5 * 26}


def test_gradients_of_a_shorter_last_accumulation_are_a_mean(tmp_path):
    method = Prune()
    _, module, _ = trained(
        tmp_path,
        method,
        model=Classifier(dropout=0.0),
        rate="constant",
        max_epochs=1,
        accumulate_grad_batches=4,
    )
    data, plain = Points(), Classifier(dropout=0.0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    parts = torch.tensor(method.seen[0]).split(4)
    for group in parts[:4], parts[4:]:
        optimizer.zero_grad()
        for index in group:
            loss = nn.functional.cross_entropy(plain(data.x[index])["logits"], data.y[index])
            (loss / len(group)).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], value)


def test_limits_and_workers(tmp_path):
    method = Prune()
    _, module, _ = trained(
        tmp_path, method, max_epochs=2, limit_train_batches=3, loading={"num_workers": 1}
    )
    assert [len(seen) for seen in method.seen] == [12, 12]
    assert method.ended == [3, 6]
    assert list(chain(*module.seen)) == list(chain(*method.seen))


# ---- the seams -----------------------------------------------------------------------------------


def test_seams_run_in_their_order(tmp_path):
    method = Recorder()
    attached, _, _ = trained(
        tmp_path, method, data=Points(8), max_epochs=1, accumulate_grad_batches=2, rate="constant"
    )
    assert method.calls == [
        "prepare", "bind", "optimizer", "order", "batch", "loss", "batch", "loss", "grads",
        "step 1", "account", "step 1 ends the epoch", "evaluating", "evaluated",
    ]  # fmt: skip
    assert method.bound["size"] == 8
    assert method.bound["epochs"] == method.bound["steps"] == 1
    assert attached.take_events() == [{"method": "recorder", "kind": "looked"}]


def test_gradients_are_seen_before_clipping_and_changes_to_them_count(tmp_path):
    class Doubling(Recorder):
        def grads(self, named_parameters: Any, context: Any) -> None:
            named = list(named_parameters)
            super().grads(named, context)
            for _, parameter in named:
                parameter.grad.mul_(1e6)

    method = Doubling()
    model = Classifier(dropout=0.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained(
        tmp_path, method, data=Points(4), max_epochs=1, gradient_clip_val=0.01, model=model,
        rate="constant",
    )  # fmt: skip
    assert method.norm > 0.01  # unclipped
    after = {name: value.detach() for name, value in model.named_parameters()}
    moved = sum(float((after[n] - before[n]).square().sum()) for n in after) ** 0.5
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)  # and clipped afterwards


def test_the_optimizer_seam_makes_groups(tmp_path):
    class Slow(Recorder):
        def optimizer(self, model: Any, groups: Any) -> Any:
            named = [pair for group in groups for pair in group["params"]]
            assert {name for name, _ in named} == set(dict(model.named_parameters()))
            return [{"params": named[:2]}, {"params": named[2:], "lr": 0.001}]

    _, _, made = trained(tmp_path, Slow(), max_epochs=1, rate="constant")
    assert [group["lr"] for group in made.optimizers[0].param_groups] == [0.1, 0.001]
    with pytest.raises(RequestError, match="2 parameter groups of 1"):
        trained(tmp_path, Slow(), max_epochs=1)


def test_experts_adapt_in_lightning_beside_pruning(tmp_path):
    attached, _, made = trained(
        tmp_path, Prune(), restless(), model=llama(), data=Sentences(), max_epochs=3
    )
    account = attached.account()
    assert attached.signals()["dynmoe"]["updates"] > 0
    assert account.spent("samples") < account.dense("samples") == 3 * 26
    assert account.spent("flops") > 0
    assert set(made.callback_metrics) == {"train_loss"}  # what is tried is not logged


def test_the_dry_run_leaves_no_trace_and_finds_what_fails(tmp_path):
    class Broken(Recorder):
        def grads(self, named_parameters: Any, context: Any) -> None:
            raise RequestError("found before training")

    class Nothing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.each(batch)[0].mean()

    with pytest.raises(RequestError, match="found before training"):
        trained(tmp_path, Broken())
    attached = sparing.LightningMethods([Prune()])
    with pytest.raises(RequestError, match=r"called methods.loss 0 times"):
        fit(trainer(tmp_path, attached), Nothing(attached), loader())

    class Stopped(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert same(dict(pl_module.state_dict()), before)
            assert torch.get_rng_state().equal(state)
            raise KeyError("seen")

    method = Prune()
    attached = sparing.LightningMethods([method])
    module = Module(attached)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="seen"):
        fit(trainer(tmp_path, attached, Stopped()), module, loader())
    assert (method.scores == 1e6).all()
    assert method.lengths == []
    assert attached.clock.step == 0
    assert attached.ledger.spent("samples") == 0


# ---- checkpoints ---------------------------------------------------------------------------------


# 8 epochs of 4 steps, of 2 or 3 where samples are left out: in mid-epoch, at an epoch's end, in
# epoch 5
@pytest.mark.parametrize(
    ("stop", "when"),
    [
        (2, {"every_n_train_steps": 2}),
        (4, {"every_n_train_steps": 4}),
        (13, {"every_n_train_steps": 1}),
        (14, {"every_n_train_steps": 1}),
        (15, {"every_n_train_steps": 1}),
        (None, {"every_n_epochs": 5, "save_on_train_epoch_end": True}),
        (None, {"every_n_epochs": 5, "save_on_train_epoch_end": False}),
    ],
)
def test_resumed_it_continues_bit_for_bit(tmp_path, stop, when):
    def build(where: str) -> tuple[Any, Module, L.Trainer]:
        saving = ModelCheckpoint(tmp_path / where, filename="{step}", save_top_k=-1, **when)
        attached = sparing.LightningMethods([Prune(ratio=0.6)])
        made = trainer(
            tmp_path, attached, saving, max_epochs=8, accumulate_grad_batches=2,
            enable_checkpointing=True,
        )  # fmt: skip
        return attached, Module(attached, model=Classifier(dropout=0.0)), made

    one, whole, whole_trainer = build("whole")
    fit(whole_trainer, whole, loader(), loader(Points(4), shuffle=False))
    ended = one.methods[0].ended
    if stop is None:
        stop = ended[4]
    path = str(tmp_path / "whole" / f"step={stop}.ckpt")
    kept = torch.load(path, weights_only=True)  # plain data and tensors: nothing runs when it loads
    assert "LightningMethods" in kept["callbacks"]
    two, second, second_trainer = build("second")
    fit(second_trainer, second, loader(), loader(Points(4), shuffle=False), ckpt_path=path)
    assert same(second.state_dict(), whole.state_dict())
    assert second_trainer.global_step == whole_trainer.global_step
    assert two.clock == one.clock
    assert one.ledger == two.ledger
    assert same(two.methods[0].state_dict(), one.methods[0].state_dict())
    assert second.seen == whole.seen[-len(second.seen) :]
    assert second.rates == whole.rates[stop:]


def test_what_cannot_be_resumed_says_so(tmp_path):
    attached, _, made = trained(tmp_path, Prune(), max_epochs=1)
    made.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RequestError, match="has trained already"):
        fit(trainer(tmp_path, attached), Module(attached), loader())
    for methods, data, said in [
        ([Recorder()], None, r"of the methods \['prune'\], attached are"),
        ([Prune()], Points(27), "with 26 samples, this one has 27"),
    ]:
        attached = sparing.LightningMethods(methods)
        with pytest.raises(RequestError, match=said):
            fit(
                trainer(tmp_path, attached),
                Module(attached),
                loader(data),
                ckpt_path=str(tmp_path / "a.ckpt"),
            )


# ---- what is refused -----------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Points())


def test_requests_that_cannot_work(tmp_path):
    with pytest.raises(RequestError, match="is a stream"):
        trained(tmp_path, Prune(), data=Stream(), loading={"shuffle": False})
    with pytest.raises(RequestError, match=r'"prune" plans whole epochs.*max_steps=3'):
        trained(tmp_path, Prune(), max_steps=3)
    with pytest.raises(RequestError, match="overfit_batches"):
        trained(tmp_path, Prune(), overfit_batches=2)
    batches = torch.utils.data.BatchSampler(range(26), 4, False)

    class Own(torch.utils.data.BatchSampler):
        pass

    with pytest.raises(RequestError, match="a batch sampler of its own"):
        trained(
            tmp_path,
            Prune(),
            loading={
                "batch_sampler": Own(batches.sampler, 4, False),
                "batch_size": 1,
                "shuffle": False,
            },
        )
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(RequestError, match="automatic_optimization"):
        fit(trainer(tmp_path, sparing.LightningMethods([Prune()])), module, loader())
    with pytest.raises(RequestError, match="one torch DataLoader, got a list"):
        fit(trainer(tmp_path, sparing.LightningMethods([Prune()])), Module(), [loader(), loader()])


def test_losses_that_are_reduced_or_not_asked_for(tmp_path):
    class Reduced(Module):
        def each(self, batch: Any) -> Any:
            losses, outputs = super().each(batch)
            return losses.mean(), outputs

    attached = sparing.LightningMethods([Prune()])
    with pytest.raises(RequestError, match="one loss for each of the 4 samples"):
        fit(trainer(tmp_path, attached), Reduced(attached), loader())
    attached = sparing.LightningMethods([Prune()], dry_run=False)
    with pytest.raises(RequestError, match=r'got shape \(\); .*reduction="none"'):
        fit(trainer(tmp_path, attached), Reduced(attached), loader())
    with pytest.raises(RequestError, match="in validation_step use"):
        sparing.LightningMethods([]).loss(torch.ones(3))


def test_a_data_set_that_changes_its_length_is_noticed(tmp_path):
    class Growing(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            data.x = torch.cat([data.x, data.x[:1]])

    data = Points()
    attached = sparing.LightningMethods([Prune()])
    with pytest.raises(RunError, match=r"had 26 samples .* and has 27 now"):
        fit(trainer(tmp_path, attached, Growing()), Module(attached), loader(data))
