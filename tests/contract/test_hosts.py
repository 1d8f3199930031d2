"""The registry's methods in all three hosts: a plain loop's Session, the Trainer, Lightning.

What a method does must not depend on who turns the loop: the same model, data, order and optimizer
give the same weights, the same state and the same account.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparing
from sparing.core import registry
from sparing.core.method import Method, implements

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))
from loop import CASES, LENGTH, SAMPLES, dense, differences, losses_of, tokens

RATE, BATCH, EPOCHS, ACCUMULATE = 0.05, 4, 2, 2

# the case of each method that acts within a few steps
CHOSEN = [(name, cases[-1]) for name, cases in CASES.items()]
# by the loss of some batches, which each host gives before the optimizer exists
SCORED = ("sparse-adapter", {"kind": "lora", "rank": 4, "keep": 0.5, "score": "snip"})
QUICK = ("dynmoe", "top-k")
every_method = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, options in CHOSEN
    ]
    + [pytest.param(*SCORED, id="sparse-adapter-scored")],
)


def build(name: str, options: dict[str, Any]) -> Method:
    return registry.method(name)(**copy.deepcopy(options))


class Tokens(torch.utils.data.Dataset[Any]):
    domains = ("even", "odd")

    def __init__(self) -> None:
        self.ids = tokens()

    def domain_of(self, index: torch.Tensor) -> torch.Tensor:
        return index % 2

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def losses(model: nn.Module, batch: Any) -> tuple[torch.Tensor, Any]:
    return losses_of(model, batch["input_ids"]), None


def in_order(epoch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.arange(SAMPLES)


def in_session(method: Method, path: Path) -> Any:
    session = sparing.Session(
        dense(),
        [method],
        data=Tokens(),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=RATE),
        losses=losses,
        batch_size=BATCH,
        accumulate=ACCUMULATE,
        epochs=EPOCHS,
        order=in_order,
        clip=1.0,
        seed=3,
    )
    for batch, context in session:
        each, outputs = session.forward(batch)
        session.step(each, context, outputs)
    return session.unwrapped, session


def in_trainer(method: Method, path: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(path),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        seed=3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=dense(), args=arguments, train_dataset=Tokens())
    attached = sparing.attach(trainer, [method], losses=losses)
    trainer.train()
    return trainer.model, attached


def in_lightning(method: Method, path: Path) -> Any:
    import lightning.pytorch as L

    attached = sparing.LightningMethods([method], seed=3)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = dense()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return attached.loss(*losses(self.model, batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=RATE)

    module = Module()
    trainer = L.Trainer(
        callbacks=[attached],
        default_root_dir=str(path),
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Tokens(), batch_size=BATCH))
    return module.model, attached


HOSTS = {"session": in_session, "trainer": in_trainer, "lightning": in_lightning}


@every_method
@pytest.mark.filterwarnings("ignore:::lightning")
def test_all_hosts_train_alike(name, options, tmp_path):
    found = {}
    for host, train in HOSTS.items():
        torch.manual_seed(7)
        method = build(name, options)
        model, whole = train(method, tmp_path)
        account = whole.account().to_dict()
        assert account["samples"]["spent"] == whole.clock.samples
        assert whole.clock.tokens == whole.clock.samples * LENGTH
        if not implements(method, "order"):  # it leaves no sample out
            assert whole.clock.samples == EPOCHS * SAMPLES
            assert whole.clock.step == EPOCHS * SAMPLES // BATCH // ACCUMULATE
        found[host] = {
            "model": dict(model.state_dict()),
            "state": method.state_dict(),
            "signals": method.signals(),
            "account": account,
        }
    assert found["session"]["account"]["flops"]["spent"] > 0
    for host in ("trainer", "lightning"):
        assert differences(found["session"], found[host]) == [], host
