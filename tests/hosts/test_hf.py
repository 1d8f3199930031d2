from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import Classifier, Points, Prune, Sentences
from test_session import same
from torch import nn
from toys import Recorder, llama, restless
from trainers import rates, trainer
from transformers import TrainerCallback

import sparing
from sparing.core.errors import RequestError, RunError
from sparing.core.method import Method, Plan


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.model.state_dict().items()}


# ---- doing nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
def test_without_methods_it_is_the_plain_trainer_bit_for_bit(tmp_path, accumulate):
    # without dropout: the plain trainer's loader draws from the global generator, this one does not
    options = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 2}
    plain = trainer(tmp_path, Classifier(dropout=0.0), **options)
    plain.train()
    watched = trainer(tmp_path, Classifier(dropout=0.0), **options)
    attached = sparing.attach(watched, [])
    watched.train()
    assert same(weights(watched), weights(plain))
    assert rates(watched) == rates(plain)
    assert attached.clock.step == watched.state.global_step == plain.state.global_step


def test_a_language_model_keeps_its_own_loss_over_tokens_where_no_method_asks(tmp_path):
    def run(attached: bool) -> dict[str, torch.Tensor]:
        made = trainer(tmp_path, llama(), Sentences(), num_train_epochs=1)
        for layer in made.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        if attached:
            sparing.attach(made, [Recorder()])
        made.train()
        return weights(made)

    assert same(run(True), run(False))


def test_a_plan_of_every_sample_makes_the_steps_and_rates_of_the_plain_trainer(tmp_path):
    plain = trainer(tmp_path, num_train_epochs=3)
    plain.train()
    made = trainer(tmp_path, num_train_epochs=3)
    sparing.attach(made, [Prune(ratio=0.0)])
    made.train()
    assert made.state.global_step == plain.state.global_step
    assert rates(made) == rates(plain)


# ---- plans, accumulation, the rate ---------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
def test_epochs_are_as_long_as_their_plans_and_the_rate_ends_at_zero(tmp_path, accumulate):
    method = Prune(ratio=0.7)
    made = trainer(tmp_path, gradient_accumulation_steps=accumulate, num_train_epochs=5)
    attached = sparing.attach(made, [method])
    made.train()
    lengths = method.lengths
    assert lengths[0] == lengths[-1] == 26  # the last epoch, annealing, was reached
    assert max(lengths[1:-1]) < 26
    # every sample of a plan once, and none of one epoch in another
    assert [sorted(seen) for seen in method.seen] == [sorted(set(seen)) for seen in method.seen]
    assert [len(seen) for seen in method.seen] == lengths
    micro = [-(-n // 4) for n in lengths]
    steps = [-(-n // accumulate) for n in micro]
    assert made.state.global_step == attached.clock.step == sum(steps)
    assert method.ended == [sum(steps[: e + 1]) for e in range(5)]
    assert made.args.max_steps == -1
    assert made.state.max_steps == sum(steps)  # exact in the end
    assert made.state.epoch == 5
    assert made.lr_scheduler.get_last_lr() == [0.0, 0.0]
    # the rate of a step is where training was before it: (epoch + share of its plan) / epochs
    total = 5 * -(-7 // accumulate)
    places = [(e + k / n) / 5 for e, n in enumerate(steps) for k in range(n)]
    assert rates(made) == pytest.approx(
        [0.01 * (1 - int(total * p + 0.5 + 1e-9) / total) for p in places]
    )
    assert attached.account().to_dict()["samples"] == {"spent": sum(lengths), "dense": 5 * 26}


def test_gradients_of_a_shorter_last_accumulation_are_a_mean(tmp_path):
    """26 samples in batches of 4, 4 of them to a step: 7 micro-batches, then 3 in a step."""
    made = trainer(
        tmp_path,
        Classifier(dropout=0.0),
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
    )
    method = Prune()
    sparing.attach(made, [method])
    made.train()
    data, plain = Points(), Classifier(dropout=0.0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    parts = torch.tensor(method.seen[0]).split(4)
    for group in parts[:4], parts[4:]:
        optimizer.zero_grad()
        for index in group:
            logits = plain(data.x[index])["logits"]
            loss = nn.functional.cross_entropy(logits, data.y[index])
            (loss / len(group)).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], value)


def test_weights_of_the_plan_reach_the_gradient(tmp_path):
    class Weighted(Method):
        name, Options, loss_stage = "weighted", Prune.Options, "weight"

        def order(self, clock: sparing.Clock) -> Plan:
            return Plan(torch.tensor([3, 5]), torch.tensor([2.0, 0.0]))

        def loss(self, losses, context, outputs):
            assert context.index[:, 0].tolist() == [3, 5]
            return losses * context.weight

    made = trainer(
        tmp_path,
        Classifier(dropout=0.0),
        num_train_epochs=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
    )
    sparing.attach(made, [Weighted()])
    made.train()
    plain, data = Classifier(dropout=0.0), Points()
    nn.functional.cross_entropy(plain(data.x[3:4])["logits"], data.y[3:4]).backward()
    for name, value in plain.named_parameters():
        expected = value.detach() - 0.01 * value.grad
        torch.testing.assert_close(made.model.state_dict()[name], expected)


@pytest.mark.parametrize("kind", ["cosine", "constant_with_warmup", "polynomial"])
def test_other_schedules_end_where_they_should(tmp_path, kind):
    made = trainer(
        tmp_path, num_train_epochs=4, lr_scheduler_type=kind, warmup_steps=3, logging_steps=1
    )
    sparing.attach(made, [Prune(ratio=0.9)])
    made.train()
    end = {"cosine": 0.0, "constant_with_warmup": 0.01, "polynomial": 1e-7}[kind]
    assert made.lr_scheduler.get_last_lr()[0] == pytest.approx(end, abs=1e-12)
    assert rates(made)[0] == 0.0
    assert rates(made)[3] == pytest.approx(0.01)


def test_a_schedule_of_the_user_follows_too(tmp_path):
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=29)
    made = trainer(tmp_path, model, optimizers=(optimizer, schedule))
    sparing.attach(made, [Prune(ratio=0.9)])
    made.train()
    assert made.state.global_step < 28
    assert schedule.last_epoch == 28
    assert made.lr_scheduler.get_last_lr()[0] == pytest.approx(0.1 / 25 / 1e4)


# ---- identity of samples -------------------------------------------------------------------------


@pytest.mark.parametrize("remove", [True, False])
def test_the_index_travels_whatever_columns_are_removed(tmp_path, remove):
    class Watching(Recorder):
        def batch(self, batch: Any, context: Any) -> Any:
            assert batch["x"][:, 0].tolist() == context.index[:, 0].tolist()
            assert ("extra" in batch) is not remove
            self.calls.append("batch")
            return {key: value for key, value in batch.items() if key != "extra"}

    made = trainer(tmp_path, remove_unused_columns=remove, num_train_epochs=1)
    method = Watching()
    sparing.attach(made, [method])
    made.train()
    assert method.calls.count("batch") == 7


def test_data_sets_of_hugging_face_and_worker_processes(tmp_path):
    datasets = pytest.importorskip("datasets")
    points = Points(12)
    data = datasets.Dataset.from_dict(
        {
            "x": points.x.tolist(),
            "labels": points.y.tolist(),
            "text": ["no column of the model"] * 12,
        }
    )
    method = Prune()
    made = trainer(tmp_path, data=data, num_train_epochs=2, dataloader_num_workers=2)
    sparing.attach(made, [method])
    made.train()
    assert [sorted(seen) for seen in method.seen] == [list(range(12))] * 2
    # scores belong to their samples: what the model says of each, at the end, is near to them
    assert (method.scores < 1e5).all()


# ---- losses --------------------------------------------------------------------------------------


def test_losses_of_sequences_are_means_over_their_labelled_tokens(tmp_path):
    from sparing.hosts.per_sample import FromLogits

    model, data = llama().eval(), Sentences(3)
    labels = data.ids.clone()
    labels[0, 5:] = -100
    labels[2] = -100
    auto = FromLogits(lambda model: model)
    losses, outputs = auto(model, {"input_ids": data.ids, "labels": labels})
    alone = model(input_ids=data.ids[:1], labels=labels[:1]).loss
    torch.testing.assert_close(losses[0], alone)
    torch.testing.assert_close(losses[1], model(input_ids=data.ids[1:2], labels=labels[1:2]).loss)
    assert losses[2] == 0  # nothing labelled: nothing to learn, and no NaN
    assert outputs.logits.shape[0] == 3


def test_label_smoothing_and_the_other_kinds_of_heads():
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    from sparing.hosts.per_sample import FromLogits

    config = {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8,
    }  # fmt: skip
    ids = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))
    auto = FromLogits(lambda model: model)
    cases: list[tuple[Any, torch.Tensor]] = [
        (BertForMaskedLM(BertConfig(**config)), ids),
        (BertForSequenceClassification(BertConfig(**config, num_labels=4)), torch.arange(3)),
        (BertForSequenceClassification(BertConfig(**config, num_labels=1)), torch.rand(3)),
        (
            BertForSequenceClassification(BertConfig(**config, num_labels=4)),
            torch.rand(3, 4).round(),
        ),
    ]
    for model, labels in cases:
        batch = {"input_ids": ids, "labels": labels}
        losses, _ = auto(model.eval(), batch)
        assert losses.shape == (3,)
        torch.testing.assert_close(losses.mean(), model(**batch).loss)
    model, labels = cases[1]
    smooth, outputs = FromLogits(lambda model: model, 0.1)(
        model, {"input_ids": ids, "labels": labels}
    )
    from transformers.trainer_pt_utils import LabelSmoother

    expected = LabelSmoother(0.1)({"logits": outputs.logits}, labels)
    torch.testing.assert_close(smooth.mean(), expected)


class OnlyLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Classifier(dropout=0.0)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        return {"loss": self.inner(x, labels)["loss"]} if labels is not None else {}


def test_a_model_that_only_gives_a_scalar_is_refused_or_falls_back(tmp_path):
    with pytest.raises(RequestError, match=r'OnlyLoss gives no logits.*losses="scalar"'):
        sparing.attach(trainer(tmp_path, OnlyLoss()), [Prune()])
    made = trainer(tmp_path, OnlyLoss(), num_train_epochs=2)
    method = Prune()
    sparing.attach(made, [method], losses="scalar")
    made.train()
    first = method.seen[-1][:4]
    assert len(set(method.scores[first].tolist())) == 1  # one number for the whole micro-batch


def test_losses_by_a_callable(tmp_path):
    def losses(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
        outputs = model(x=batch["x"])
        return (outputs["logits"].sum(1) - batch["labels"]).square(), outputs

    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return (outputs["logits"].sum(1) - labels).square().mean()

    made = trainer(tmp_path, num_train_epochs=1, compute_loss_func=own)
    with pytest.raises(RequestError, match="compute_loss_func, which gives one number"):
        sparing.attach(made, [Prune()])
    method = Prune()
    sparing.attach(made, [method], losses=losses)
    made.train()
    assert (method.scores < 1e5).all()

    with pytest.raises(RequestError, match="one loss for each of the 4 samples"):
        sparing.attach(
            trainer(tmp_path), [Prune()], losses=lambda m, b: (losses(m, b)[0].mean(), None)
        )
    with pytest.raises(RequestError, match='losses must be "auto"'):
        sparing.attach(trainer(tmp_path), [], losses="automatic")


# ---- the seams -----------------------------------------------------------------------------------


def test_seams_run_in_their_order(tmp_path):
    method = Recorder()
    made = trainer(
        tmp_path,
        data=Points(8),
        eval_dataset=Points(4),
        eval_strategy="epoch",
        num_train_epochs=1,
        gradient_accumulation_steps=2,
        logging_strategy="no",
    )
    attached = sparing.attach(made, [method])
    assert method.calls == ["prepare", "bind"]
    assert method.bound["size"] == 8
    assert method.bound["epochs"] == method.bound["steps"] == 1
    made.train()
    assert method.calls[2:] == [
        "optimizer", "order", "batch", "loss", "batch", "loss", "grads", "step 1", "account",
        "step 1 ends the epoch", "evaluating", "evaluated",
    ]  # fmt: skip
    assert attached.ledger.spent("bytes") == 1
    assert attached.take_events() == [{"method": "recorder", "kind": "looked"}]
    assert attached.signals()["recorder"]["calls"] > 0


@pytest.mark.parametrize("largest", [0.0, 1e-6, 100.0])
def test_gradients_are_seen_before_clipping_and_changes_to_them_count(tmp_path, largest):
    class Doubling(Recorder):
        def grads(self, named_parameters: Any, context: Any) -> None:
            named = list(named_parameters)
            super().grads(named, context)
            for _, parameter in named:
                parameter.grad.mul_(2)

    made = trainer(tmp_path, data=Points(4), num_train_epochs=1, max_grad_norm=largest)
    method = Doubling()
    sparing.attach(made, [method])
    made.train()
    assert method.norm > 1e-3
    # what the trainer reports is the norm before its clipping, and after the seam
    reported = made.state.log_history[0]["grad_norm"]
    assert reported == pytest.approx(2 * method.norm, rel=1e-5)


def test_the_optimizer_seam_makes_groups(tmp_path):
    class Slow(Recorder):
        def optimizer(self, model: Any, groups: Any) -> Any:
            assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
            named = [pair for group in groups for pair in group["params"]]
            assert {name for name, _ in named} == set(dict(model.named_parameters()))
            last = [pair for pair in named if pair[0].startswith("body.3")]
            rest = [pair for pair in named if not pair[0].startswith("body.3")]
            return [{"params": rest}, {"params": last, "lr": 0.001, "weight_decay": 0.0}]

    made = trainer(tmp_path, num_train_epochs=1, weight_decay=0.1, lr_scheduler_type="constant")
    sparing.attach(made, [Slow()])
    made.train()
    groups = made.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.001]
    assert [len(group["params"]) for group in groups] == [2, 2]


def test_experts_adapt_in_the_trainer_beside_pruning(tmp_path):
    made = trainer(
        tmp_path, llama(), Sentences(), num_train_epochs=3, gradient_accumulation_steps=2
    )
    attached = sparing.attach(made, [Prune(), restless()])
    made.train()
    account = attached.account()
    assert attached.signals()["dynmoe"]["updates"] > 0
    assert account.spent("samples") < account.dense("samples") == 3 * 26
    assert account.spent("flops") > 0
    assert account.spent("active_parameters") > 0
    assert any("dynmoe/mean_k" in entry for entry in made.state.log_history)
    # losses of the routers, which have no sample, were added to the loss that is trained on
    assert attached.clock.tokens == account.spent("tokens") == account.spent("samples") * 8


def test_sparse_adapters_are_scored_by_the_data_and_loss_of_the_trainer(tmp_path):
    def adapter() -> sparing.SparseAdapter:
        return sparing.SparseAdapter(kind="lora", score="snip", keep=0.5, batches=2)

    made = trainer(tmp_path / "a", llama(), Sentences(), num_train_epochs=1)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    attached = sparing.attach(made, [adapter()])
    chosen = attached.signals()["sparse-adapter"]
    assert chosen["kept_entries"] == round(0.5 * chosen["entries"])
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained
    assert not trained & set(before)
    made.train()
    after = dict(made.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert attached.account().spent("parameters") == chosen["trained_parameters"]
    # the same masks as by hand, on the same batches and loss
    model = llama()
    batches = list(attached._shuffled())[:2]
    sparing.adapt_(model, adapter(), batches, lambda m, b: m(**b).loss, seed=made.args.seed)
    kept = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert kept == {name: after[name].shape for name in trained}


def test_the_dry_run_leaves_no_trace_and_finds_what_fails(tmp_path):
    class Broken(Recorder):
        def grads(self, named_parameters: Any, context: Any) -> None:
            raise RequestError("found before training")

    torch.manual_seed(3)
    with pytest.raises(RequestError, match="found before training"):
        sparing.attach(trainer(tmp_path), [Broken()])

    made, method = trainer(tmp_path, llama(), Sentences()), Prune()
    before = weights(made)
    state = torch.get_rng_state()
    attached = sparing.attach(made, [method])
    assert same(weights(made), before)
    assert torch.get_rng_state().equal(state)
    assert all(p.grad is None for p in made.model.parameters())
    assert (method.scores == 1e6).all()
    assert method.lengths == []
    assert attached.clock.step == attached.clock.samples == 0
    assert attached.epochs.plan is None
    assert attached.ledger.spent("samples") == 0


# ---- checkpoints ---------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def resumed(path: Path, stop: int, build: Any, methods: Any) -> tuple[Any, Any, Any, Any]:
    """Trained in one go, and with a stop after which all is built anew."""
    whole = build(path / "whole")
    one = sparing.attach(whole, methods())
    whole.train()
    first = build(path / "parts")
    first.add_callback(Stop(stop))
    sparing.attach(first, methods())
    first.train()
    second = build(path / "parts")
    two = sparing.attach(second, methods())
    second.train(resume_from_checkpoint=str(path / "parts" / f"checkpoint-{stop}"))
    return whole, one, second, two


# with 8 epochs of 4 steps (2 or 3 where samples are left out): in mid-epoch, at an epoch's end,
# in epoch 5
@pytest.mark.parametrize("stop", [2, 4, 15])
def test_resumed_it_continues_bit_for_bit(tmp_path, stop):
    def build(path: Path) -> Any:
        return trainer(path, num_train_epochs=8, gradient_accumulation_steps=2)

    whole, one, second, two = resumed(tmp_path, stop, build, lambda: [Prune(ratio=0.6)])
    assert same(weights(second), weights(whole))
    assert second.state.global_step == whole.state.global_step
    assert two.clock == one.clock
    assert one.ledger == two.ledger
    assert same(two.methods[0].state_dict(), one.methods[0].state_dict())
    assert second.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr() == [0.0, 0.0]
    if stop == 15:
        place = json.loads((tmp_path / "parts/checkpoint-15/trainer_state.json").read_text())
        assert 4 < place["epoch"] < 6


def test_experts_that_adapt_are_resumed_bit_for_bit(tmp_path):
    def build(path: Path) -> Any:
        return trainer(path, llama(), Sentences(), num_train_epochs=2)

    whole, one, second, two = resumed(tmp_path, 9, build, lambda: [Prune(), restless()])
    assert same(weights(second), weights(whole))
    assert same(two.methods[1].state_dict(), one.methods[1].state_dict())
    assert one.ledger == two.ledger


def test_the_state_is_no_pickle(tmp_path):
    made = trainer(tmp_path, num_train_epochs=1, save_strategy="epoch")
    sparing.attach(made, [Prune()])
    made.train()
    files = [p for p in (tmp_path / "checkpoint-7" / "sparing").rglob("*") if p.is_file()]
    assert {p.name for p in files} == {"state.json", "tensors.safetensors"}


def test_what_cannot_be_resumed_says_so(tmp_path):
    made = trainer(tmp_path / "a", num_train_epochs=2, save_strategy="epoch")
    sparing.attach(made, [Prune()])
    made.train()
    saved = str(tmp_path / "a" / "checkpoint-7")
    with pytest.raises(RequestError, match="has trained already"):
        made.train()

    other = trainer(tmp_path / "b", num_train_epochs=2)
    sparing.attach(other, [Recorder()])
    with pytest.raises(RequestError, match=r"of the methods \['prune'\], attached are"):
        other.train(resume_from_checkpoint=saved)

    longer = trainer(tmp_path / "b", data=Points(27), num_train_epochs=2)
    sparing.attach(longer, [Prune()])
    with pytest.raises(RequestError, match="with 26 samples, this one has 27"):
        longer.train(resume_from_checkpoint=saved)

    plain = trainer(tmp_path / "c", num_train_epochs=1, save_strategy="epoch")
    plain.train()
    late = trainer(tmp_path / "c", num_train_epochs=2)
    sparing.attach(late, [Prune()])
    with pytest.raises(RunError, match="holds no state of methods"):
        late.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-7"))


# ---- what is refused -----------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Points())


def test_streams_are_refused_with_the_way_out(tmp_path):
    made = trainer(tmp_path, data=Stream(), max_steps=3)
    with pytest.raises(RequestError, match=r"is a stream.*streaming=False"):
        sparing.attach(made, [Prune()])


def test_a_data_set_that_changes_its_length_is_noticed(tmp_path):
    class Growing(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            data.x = torch.cat([data.x, data.x[:1]])

    data = Points()
    made = trainer(tmp_path, data=data, callbacks=[Growing()])
    sparing.attach(made, [Prune()])
    with pytest.raises(RunError, match=r"had 26 samples .* and has 27 now"):
        made.train()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 5}, r'"prune" plans whole epochs.*max_steps=5'),
        ({"num_train_epochs": 1.5}, "num_train_epochs=1.5"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"model_init": lambda: Classifier()}, "model_init"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, options, said):
    with pytest.raises(RequestError, match=said):
        sparing.attach(trainer(tmp_path, **options), [Prune()])


def test_other_requests_that_cannot_work(tmp_path):
    with pytest.raises(RequestError, match=r"takes a transformers.Trainer, got object"):
        sparing.attach(object(), [Prune()])
    made = trainer(tmp_path)
    sparing.attach(made, [Prune()])
    with pytest.raises(RequestError, match="attached to this trainer already"):
        sparing.attach(made, [Prune()])
    model = llama()
    built = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(RequestError, match="given an optimizer that was built before"):
        sparing.attach(trainer(tmp_path, model, Sentences(), optimizers=built), [restless()])
    with pytest.raises(RequestError, match="the collator gives a tuple"):
        sparing.attach(trainer(tmp_path, data_collator=lambda rows: (1, 2)), [Prune()])
    bare = trainer(tmp_path)
    bare.train_dataset = None
    with pytest.raises(RequestError, match="no train_dataset"):
        sparing.attach(bare, [Prune()])


def test_a_limit_of_steps_works_where_no_method_plans(tmp_path):
    made = trainer(tmp_path, max_steps=9)
    attached = sparing.attach(made, [])
    made.train()
    assert made.state.global_step == attached.clock.step == attached.clock.steps == 9
    assert attached.clock.epoch == 1
    assert made.lr_scheduler.get_last_lr() == [0.0, 0.0]
