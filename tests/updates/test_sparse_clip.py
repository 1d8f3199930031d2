"""A global clip beside sparse gradients, in each host: torch's own has no norm of them."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from clicks import Model, batch, loss_of, reference
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import sparing
from sparing.core.sparse_gradients import clip_norm_
from sparing.updates.cowclip import CowClip

TIGHT = {"ratio": 0.001, "bound": 1e-5}
LARGEST = 0.002
IDS, LABELS = batch(16)
ROWS = [{"ids": i, "labels": label} for i, label in zip(IDS, LABELS, strict=True)]


@pytest.fixture(scope="module")
def expected():
    """One step of SGD at rate 1 on dense gradients: rows clipped, then the global norm."""
    model = Model()
    loss_of(model, IDS, LABELS).backward()
    grad = model.table.weight.grad
    ids = IDS.flatten().tolist()
    grad.copy_(reference(grad, model.table.weight, ids, **TIGHT))
    assert nn.utils.clip_grad_norm_(model.parameters(), LARGEST) > LARGEST
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model.state_dict()


def same(model, expected):
    assert model.table.weight.grad is None or model.table.weight.grad.is_sparse
    torch.testing.assert_close(model.state_dict(), expected, rtol=1e-6, atol=1e-8)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


class ForTrainer(Model):
    def forward(self, ids, labels=None):  # type: ignore[override]
        logits = super().forward(ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": binary_cross_entropy_with_logits(logits, labels), "logits": logits}


class ForLightning(pl.LightningModule):
    def __init__(self, methods):
        super().__init__()
        self.model, self.methods = Model(sparse=True), [methods]

    def training_step(self, given, number):
        outputs = self.model(given["ids"])
        labels = given["labels"]
        each = binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return self.methods[0].loss(each, outputs)

    def configure_optimizers(self):
        return sgd(self.parameters())


@pytest.mark.parametrize("repeated", [False, True])
def test_the_norm_is_that_of_dense_gradients(repeated):
    ids = torch.tensor([1, 1, 4] if repeated else [1, 2, 4])
    found = []
    for sparse in (False, True):
        model = Model(sparse=sparse)
        model.table(ids).sin().sum().backward()
        model.out(torch.ones(1, 18)).sum().backward()
        norm = clip_norm_(iter(list(model.parameters())), 0.5)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([norm, *(g.to_dense() if g.is_sparse else g for g in grads)])
    torch.testing.assert_close(*found)
    assert found[0][0] > 0.5


def test_without_sparse_gradients_it_is_torchs_to_the_last_bit():
    one, two = Model(), Model()
    for model, clip in ((one, clip_norm_), (two, nn.utils.clip_grad_norm_)):
        loss_of(model, IDS, LABELS).backward()
        clip(model.parameters(), LARGEST)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert p.grad.equal(q.grad)


def test_in_a_plain_loop(expected):
    model = Model(sparse=True)
    optimizer = sgd(model.parameters())
    CowClip.direct(model, optimizer, clip=LARGEST, **TIGHT)
    loss_of(model, IDS, LABELS).backward()
    optimizer.step()
    same(model, expected)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_in_a_loop_of_accelerate(expected, accumulate):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    plain = Model(sparse=True)
    model, optimizer = accelerator.prepare(plain, sgd(plain.parameters()))
    CowClip.direct(model, optimizer, clip=LARGEST, **TIGHT)
    size = len(IDS) // accumulate
    for ids, labels in zip(IDS.split(size), LABELS.split(size), strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, ids, labels))
            optimizer.step()
            optimizer.zero_grad()
    same(plain, expected)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_in_a_session(expected, accumulate):
    def losses(model, given):
        outputs = model(given["ids"])
        each = binary_cross_entropy_with_logits(outputs, given["labels"], reduction="none")
        return each, outputs

    session = sparing.Session(
        Model(),
        [CowClip(gradients="sparse", **TIGHT)],
        data=ROWS,
        batch_size=16 // accumulate,
        accumulate=accumulate,
        epochs=1,
        optimizer=sgd,
        losses=losses,
        clip=LARGEST,
    )
    for given, context in session:
        each, outputs = session.forward(given)
        session.step(each, context, outputs)
    same(session.unwrapped, expected)


@pytest.mark.parametrize("largest", [LARGEST, 0.0])
def test_in_the_trainer(expected, largest, tmp_path):
    model = ForTrainer(sparse=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=16,
            max_grad_norm=largest,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=ROWS,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}),
    )
    sparing.attach(trainer, [CowClip(**TIGHT)])
    trainer.train()
    norm = trainer.state.log_history[0]["grad_norm"]
    assert norm > LARGEST  # asked for in every step, clipped or not
    if largest:
        same(model, expected)


def test_in_lightning(expected, tmp_path):
    methods = sparing.LightningMethods([CowClip(**TIGHT)])
    module = ForLightning(methods)
    trainer = pl.Trainer(
        max_epochs=1,
        gradient_clip_val=LARGEST,
        callbacks=[methods],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = partial(DataLoader, ROWS, batch_size=16)
    trainer.fit(module, loader())
    same(module.model, expected)
    assert "clip_grad_by_norm" not in vars(trainer.precision_plugin)


def test_micro_batches_leave_each_row_once():
    model = Model(sparse=True)
    optimizer = sgd(model.parameters())
    method = CowClip.direct(model, optimizer, **TIGHT)
    for ids, labels in zip(IDS.split(4), LABELS.split(4), strict=True):
        loss_of(model, ids, labels).backward()
        ids = model.table.weight.grad._indices()[0]
        assert ids.equal(ids.unique())
    method.remove()
    loss_of(model, IDS, LABELS).backward()
    assert len(model.table.weight.grad._values()) > len(ids)


@pytest.mark.parametrize("hooked", [False, True])
def test_micro_batches_add_up_as_torch_adds_them(hooked):
    found = []
    for clipped in (False, True):
        model = Model(sparse=True)
        if clipped:
            CowClip.direct(model, sgd(model.parameters()), **TIGHT)
        if hooked:  # it has to see the gradient of one backward pass, whatever is there already
            model.table.weight.register_hook(lambda grad: 2 * grad)
        for ids, labels in zip(IDS.split(4), LABELS.split(4), strict=True):
            loss_of(model, ids, labels).backward()
        found.append(model.table.weight.grad.to_dense())
    torch.testing.assert_close(*found)


def test_a_model_that_is_clipped_can_be_copied_and_pickled():
    model = Model(sparse=True)
    CowClip.direct(model, sgd(model.parameters()), **TIGHT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.table.weight))):
        assert isinstance(other, nn.Module | nn.Parameter)
