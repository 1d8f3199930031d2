from __future__ import annotations

from pathlib import Path

import pytest
from pruning import Prune
from trainers import trainer

import forked
import sparing


@pytest.mark.slow
def test_two_ranks_in_trainer_and_lightning_and_resumed_on_one(tmp_path):
    worker = Path(__file__).with_name("trainers_worker.py")
    forked.script(worker, tmp_path / "store", tmp_path, seconds=1200)
    # one rank goes on in the middle of the epoch that two began: 24 of its 26 samples are done
    method = Prune(ratio=0.7)
    made = trainer(
        tmp_path, num_train_epochs=5, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    from toys import Recorder

    attached = sparing.attach(made, [method, Recorder()])
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    rest = method.seen[0]
    seen = [int(i) for i in (tmp_path / "seen").read_text().split()]
    assert len(seen) == 12
    assert len(rest) == len(set(rest)) == 26 - 24
    assert not set(rest) & set(seen)
    assert [len(epoch) for epoch in method.seen[1:]] == method.lengths
    assert attached.clock.epoch == 5
    assert attached.account().spent("samples") == 26 + sum(method.lengths)
    assert made.lr_scheduler.get_last_lr() == [0.0, 0.0]
