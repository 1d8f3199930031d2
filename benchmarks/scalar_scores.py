"""Scores from batch losses alone beside true ones, on Fashion-MNIST in full training.

    python benchmarks/scalar_scores.py [--epochs 15] [--batch 128 16]

Where a loss comes as one number, each sample's score is a moving average of the batch losses that
it was part of (``batch_loss``). How far does it tell samples apart? After each epoch: the rank
correlation with the losses of the same epoch per sample; and, of the samples that truly lie below
the mean loss, the share that InfoBatch would find among those below the mean of such scores,
beside what chance would find.

Writes benchmarks/records/scalar_scores.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from scipy import stats

from record import write
from sparing.run.recipe import load
from sparing.samples.scores import ScoreTable

MOMENTUM = 0.7
"""The default of ``batch_loss``."""


def compared(true: np.ndarray, scalar: np.ndarray) -> dict[str, float]:
    """How alike two scores of the same samples are, (N,) each."""
    low, found = true < true.mean(), scalar < scalar.mean()
    return {
        "rank correlation": round(float(stats.spearmanr(true, scalar).statistic), 4),
        "of those below the mean, found": round(float((low & found).sum() / low.sum()), 4),
        "by chance": round(float(found.mean()), 4),
    }


def one(batch_size: int, epochs: int, seed: int) -> dict[str, Any]:
    """One training with both kinds of scores noted beside it."""
    recipe = load("vision-infobatch", [f"seed={seed}"], preset="fashion-mnist")
    task, train = recipe.build_task(), recipe.train
    task.prepare(seed)
    model = task.model(seed)
    rate = train.learning_rate * batch_size / train.batch_size
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=train.weight_decay
    )
    size = len(task.train)
    true, scalar = ScoreTable(size), ScoreTable(size)
    steps = epochs * -(-size // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, anneal_strategy="linear"
    )
    told = {}
    for epoch in range(epochs):
        task.train.set_epoch(epoch)
        order = task.order(epoch, torch.Generator().manual_seed(seed * 1_000 + epoch))
        for index in order.split(batch_size):
            losses, _ = task.losses(model, task.train.batch(index))
            loss = losses.mean()
            true.update_(index, losses.detach())
            scalar.update_(index, loss.detach().expand(index.shape), momentum=MOMENTUM)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        told[f"epoch {epoch + 1}"] = compared(true.value, scalar.value)
        print(batch_size, seed, epoch + 1, told[f"epoch {epoch + 1}"], flush=True)
    return {"accuracy": round(task.evaluate(model)["accuracy"], 3), **told}


def main() -> None:
    """Train once for each batch size and seed, and record what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = {
        f"batches of {size}, seed {seed}": one(size, given.epochs, seed)
        for size in given.batch
        for seed in range(given.seeds)
    }
    write("scalar_scores", results, seeds=list(range(given.seeds)))


if __name__ == "__main__":
    main()
