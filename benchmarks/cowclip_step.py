"""What a step of DeepFM with CowClip costs by batch size, whole and in micro-batches, on one core.

Each kind trains on the same 65,536 rows: as 64 steps of 1,024, 8 of 8,192, one of 65,536, and one
of 65,536 in 8 micro-batches, whose ids are counted and clipped together. Dense gradients under
AdamW, and sparse ones under row-wise AdamW with the decay of a table's rows made up for when they
are read. One thread, processor time, kinds in turns. ``clip`` is the share of counting, clipping
and its statistics in the time of a kind; adding up the entries of a sparse gradient's rows is not
in it, since the optimizer has to do so without a clip too, but has a share of its own, ``adding``.

    python benchmarks/cowclip_step.py [--rounds N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cowclip_crossover import drawn
from record import in_turns, spread, write
from sparing.core import sparse_gradients
from sparing.tasks.clicks.models import ClickModel
from sparing.updates.cowclip import CowClip
from sparing.updates.rowwise import RowWise

NAME, WHOLE, MICRO = "cowclip_step", 65_536, 8_192
LOGS = {"10 fields, 72,780 rows": (10, 7_278), "26 fields, 1,000,012 rows": (26, 38_462)}
KINDS = {
    "1,024": (1_024, 1),
    "8,192": (8_192, 1),
    "65,536": (WHOLE, 1),
    "65,536 in 8 micro-batches": (MICRO, WHOLE // MICRO),
}


def trained(
    sparse: bool, sizes: list[int], ids: Tensor, labels: Tensor, batch: int, accumulate: int
) -> tuple[Callable[[], None], list[tuple[float, float]]]:
    """A pass over all rows, and the seconds that clips and sums of rows took, which it adds to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ClickModel("deepfm", sizes, sparse=sparse)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    others = [p for p in model.parameters() if not any(p is table for table in tables)]
    decay = {"weight_decay": 1e-5}
    optimizer: torch.optim.Optimizer
    if sparse:
        rule = {"rule": "rowwise-adamw", "lazy": True, **decay}
        optimizer = RowWise([{"params": tables, **rule}, {"params": others}], lr=1e-3)
    else:
        groups: list[Any] = [{"params": tables, **decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-7, fused=True)
    method = CowClip.direct(model, optimizer)
    spent: list[tuple[float, float]] = []
    clip = method.grads
    added = [0.0]

    def timed(*given: Any) -> None:
        start = time.process_time()
        clip(*given)
        spent.append((time.process_time() - start, added[0]))
        added[0] = 0.0

    def timing(weight: Tensor) -> Callable[[Tensor], Tensor]:
        def adding(grad: Tensor) -> Tensor:
            start = time.process_time()
            found = sparse_gradients.added(weight, grad)
            added[0] += time.process_time() - start
            return found

        return adding

    method.grads = timed  # type: ignore[method-assign]
    for handle in method._adding:  # the hooks that do it, timed
        handle.remove()
    for table in tables:
        table.register_hook(timing(table))  # type: ignore[no-untyped-call]

    def run() -> None:
        for done, start in enumerate(range(0, len(ids), batch), start=1):
            some = slice(start, start + batch)
            logits = model(ids[some])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[some])
            (loss / accumulate).backward()
            if done % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()

    return run, spent


def measure(fields: int, size: int, *, sparse: bool, rounds: int) -> dict[str, Any]:
    ids = torch.stack([drawn("zipf", WHOLE, size + f) % size for f in range(fields)], dim=1)
    labels = (torch.rand(WHOLE, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    made = {
        name: trained(sparse, [size] * fields, ids, labels, *kind) for name, kind in KINDS.items()
    }
    times = in_turns({name: run for name, (run, _) in made.items()}, repetitions=rounds, warm_up=1)
    found: dict[str, Any] = {}
    for name, (_run, spent) in made.items():
        cpu = times[name]["cpu"]
        steps = len(spent) // (rounds + 1)
        rounds_ = [spent[i : i + steps] for i in range(steps, len(spent), steps)]
        clips, sums = ([sum(part[k] for part in one) for one in rounds_] for k in (0, 1))
        found[name] = {
            "rows_per_second": spread([WHOLE / s for s in cpu], 0),
            "clip": spread([c / s for c, s in zip(clips, cpu, strict=True)], 4),
            "adding": spread([a / s for a, s in zip(sums, cpu, strict=True)], 4),
            "over_8192": spread(
                [base / s for s, base in zip(cpu, times["8,192"]["cpu"], strict=True)], 3
            ),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, (fields, size) in LOGS.items():
        for sparse in (False, True):
            key = f"{name}, {'sparse' if sparse else 'dense'} gradients"
            results[key] = measure(fields, size, sparse=sparse, rounds=rounds)
            for kind, entry in results[key].items():
                print(key, kind, {k: v["median"] for k, v in entry.items()}, flush=True)
    write(
        NAME,
        results,
        seeds=[0],
        note="Rows a second of processor time, one thread, whole steps; over_8192: the speed over "
        "that of batches of 8,192 in the same round. Other work ran on the machine.",
    )


if __name__ == "__main__":
    main()
