"""What each of two gloo ranks does with foreign trainers: a script of test_trainers_ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pruning import Classifier, Points, Prune
from toys import Recorder

import forked
import sparing
from sparing.core import ranks

EPOCHS = 5


def check(method: Prune, attached: Any, model: Any) -> None:
    """Both ranks took their shares of the same plans, and hold the same weights and scores."""
    shares = ranks.gather(method.seen)
    for epoch, length in enumerate(method.lengths):
        each = [share[epoch] for share in shares]
        assert len(each[0]) == len(each[1]) == length // 2
        assert len({*each[0], *each[1]}) == 2 * (length // 2)
    assert method.lengths[0] == method.lengths[-1] == 26 > max(method.lengths[1:-1])
    ranks.agree("scores", method.scores)
    for name, tensor in model.state_dict().items():
        ranks.agree(name, tensor)
    spent = sum(2 * (length // 2) for length in method.lengths)
    assert attached.account().to_dict()["samples"] == {
        "spent": spent,
        "dense": spent + sum(26 - length for length in method.lengths),
    }
    assert attached.clock.samples == spent
    assert attached.clock.epoch == EPOCHS


class Norms(Recorder):
    def step(self, clock: Any, optimizer: Any) -> None:
        super().step(clock, optimizer)
        if clock.samples:  # not in the dry run, where each rank tries its own copy
            ranks.agree("the norm of the gradients, which are reduced", self.norm)


def in_trainer(path: Path) -> None:
    from trainers import rates, trainer

    method = Prune(ratio=0.7)
    made = trainer(
        path,
        num_train_epochs=EPOCHS,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=None,
    )
    attached = sparing.attach(made, [method, Norms()])
    made.train()
    check(method, attached, made.model)
    assert made.lr_scheduler.get_last_lr() == [0.0, 0.0]
    assert len(rates(made)) == attached.clock.step
    if ranks.rank() == 0:
        # the first 3 steps of the first epoch, on both ranks
        first = [part[0][:12] for part in [method.seen]]
        (path / "seen").write_text(" ".join(map(str, first[0])))


def in_lightning(path: Path) -> None:
    from lightnings import Module, fit, loader, trainer

    method = Prune(ratio=0.7)
    attached = sparing.LightningMethods([method, Norms()])
    module = Module(attached, model=Classifier())
    made = trainer(
        path,
        attached,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        devices=2,
        strategy="ddp",
    )
    fit(made, module, loader(Points(), batch_size=2))
    check(method, attached, module)
    assert made.optimizers[0].param_groups[0]["lr"] == 0


def work(rank: int) -> None:
    in_trainer(Path(sys.argv[2]))
    in_lightning(Path(sys.argv[2]))


if __name__ == "__main__":
    import lightnings  # noqa: F401  both forks need them
    import trainers  # noqa: F401

    forked.ranks(work, sys.argv[1])
