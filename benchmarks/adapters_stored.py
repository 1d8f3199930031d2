"""What a sparse adapter of MiniLM takes on disk and in the optimizer, against a dense one.

    SPARING_DATA=... python benchmarks/adapters_stored.py

By kind, dtype, score and share kept. "entries": bytes of kept values and of the coded mask, over
those of all entries; "floor": the same if the mask took the entropy of its share and no more.
"file": the whole directory as ``save_adapter`` writes it, with biases, head and descriptions, over
that of the dense adapter. "optimizer": bytes of AdamW's state of the matrices, over that of the
dense one.
Writes benchmarks/records/adapters_stored.json.
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import minilm
import sparing
from record import write
from sparing.weights.factor import Factor
from sparing.weights.stored import encode

KINDS, KEEPS = ("pfeiffer", "lora"), (0.2, 0.4, 0.6)
DTYPES = {"float32": 4, "bfloat16": 2}
TARGETS = {("float32", 0.2): 0.226, ("bfloat16", 0.2): 0.25}


def adapted(base: nn.Module, texts: Any, **options: Any) -> nn.Module:
    """A copy of the base with an adapter; one batch is enough for the place of entries."""
    return sparing.adapt_(
        copy.deepcopy(base),
        sparing.SparseAdapter(batches=1, seed=0, **options),
        data=minilm.batches(texts, 1),
        loss=minilm.loss(texts),
    )


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of kept entries with their mask, of the whole file, and of AdamW's state of them."""
    factors = [module for module in model.modules() if isinstance(module, Factor)]
    values = sum(f.values.numel() * f.values.element_size() for f in factors)
    masks = encode(torch.cat([f.mask().reshape(-1) for f in factors])).numel()
    whole = all(f.kept == f.size for f in factors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        sparing.save_adapter(model, path)
        file = sum(each.stat().st_size for each in path.iterdir())
    parameters = [f.values for f in factors]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(
        t.numel() * t.element_size()
        for each in optimizer.state.values()
        for t in each.values()
        if t.ndim
    )
    return {
        "entries": values + (0 if whole else masks),
        "file": file,
        "optimizer": state,
        "mask": masks,
        "count": sum(f.size for f in factors),
        "kept": sum(f.kept for f in factors),
    }


def main() -> None:
    """Measure all combinations and write the record."""
    torch.set_num_threads(1)
    texts = minilm.task()
    base = texts.model(0).eval()
    results: dict[str, Any] = {}
    for kind in KINDS:
        for dtype, width in DTYPES.items():
            dense = sizes(adapted(base, texts, kind=kind, dtype=dtype, keep=1.0, score="random"))
            for score in ("random", "snip"):
                for keep in KEEPS:
                    found = sizes(
                        adapted(base, texts, kind=kind, dtype=dtype, keep=keep, score=score)
                    )
                    share = found["kept"] / found["count"]
                    bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
                    row: dict[str, Any] = {
                        "kept": found["kept"],
                        "of": found["count"],
                        "mask, bits an entry": round(8 * found["mask"] / found["count"], 4),
                        "entries": round(found["entries"] / dense["entries"], 4),
                        "floor": round(share + bits / (8 * width), 4),
                        "file": round(found["file"] / dense["file"], 4),
                        "file, bytes": found["file"],
                        "optimizer": round(found["optimizer"] / dense["optimizer"], 4),
                    }
                    target = TARGETS.get((dtype, keep))
                    row["target for entries"] = target
                    row["met"] = None if target is None else row["entries"] <= target
                    name = f"{kind}, {dtype}, {score}, keep {keep}"
                    results[name] = row
                    print(name, row, flush=True)
    write(
        "adapters_stored",
        results,
        seeds=[0],
        note="MiniLM with a head of four classes; optimizer: at most the share kept is the target.",
    )


if __name__ == "__main__":
    main()
