"""How much memory and time converting a model of 7B shape takes.

    python benchmarks/convert_size.py [--layers 32] [--dim 4096] [--width 11008] [--folder /tmp]

The model is written on the spot with random weights in bf16 (d 4096, width 11008, 32 layers,
32,000 tokens: 13 GB, in shards of at most 5 GB), cut at random into 8 experts, 2 active, in a
process of its own of which the greatest resident memory is read, and deleted: it needs 28 GB of
disk. The limit is 1.5 times the largest shard and 2 GB. Writes
benchmarks/records/convert_size.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from record import write
from sparing.convert.writing import Entry, index_of
from sparing.convert.writing import write as write_file
from sparing.core.state import atomic_write_json

SHARD = 5_000_000_000
CHILD = """
import resource, sys, time
from sparing.convert import Conversion, convert
import torch, transformers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
convert(sys.argv[1], sys.argv[2], Conversion(experts=8, active=2))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(before * 1024, peak * 1024, time.perf_counter() - begun)
"""


def large(folder: Path, layers: int, dim: int, width: int) -> dict[str, Any]:
    dense = folder / "large"
    dense.mkdir()
    # in a process of its own, since a child's greatest memory begins with its parent's
    making = [sys.executable, __file__, "--make", str(dense), "--layers", str(layers)]
    subprocess.run([*making, "--dim", str(dim), "--width", str(width)], check=True)
    index = json.loads((dense / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    shard = max((dense / file).stat().st_size for file in files)
    asked = [sys.executable, "-c", CHILD, str(dense), str(folder / "large-8x2")]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    before, peak, seconds = float(told[0]), float(told[1]), float(told[2])
    shutil.rmtree(dense)
    shutil.rmtree(folder / "large-8x2")
    allowed = 1.5 * shard + 2e9
    return {
        "layers": layers,
        "dim": dim,
        "width": width,
        "largest_shard_bytes": shard,
        "resident_before_bytes": before,
        "peak_resident_bytes": peak,
        "allowed_bytes": allowed,
        "within": peak < allowed,
        "seconds": round(seconds, 1),
    }


def random_checkpoint(folder: Path, layers: int, dim: int, width: int) -> None:
    """A LLaMA in ``folder``, of 7B shape with 32 layers of 4096 and 11008."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=dim,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=dim // 128,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, dim)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (dim, dim)
        for name in ("gate", "up"):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = (width, dim)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (dim, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (dim,)
    shapes["model.norm.weight"] = (dim,)
    shapes["lm_head.weight"] = (32_000, dim)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[Entry]] = {}
    held = SHARD + 1
    for name, shape in shapes.items():

        def make(shape: tuple[int, ...] = shape) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

        entry = Entry(name=name, dtype=torch.bfloat16, shape=shape, make=make)
        if held + entry.size > SHARD:
            held, file = 0, f"model-{len(files) + 1:05d}.safetensors"
        held += entry.size
        files.setdefault(file, []).append(entry)
    for file, entries in files.items():
        write_file(folder / file, entries)
    atomic_write_json(folder / "model.safetensors.index.json", index_of(files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--dim", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--width", type=int, default=11008)
    parser.add_argument("--try", dest="trying", action="store_true", help="write no record")
    parser.add_argument("--make", type=Path, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make is not None:
        random_checkpoint(asked.make, asked.layers, asked.dim, asked.width)
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        found = large(Path(made), asked.layers, asked.dim, asked.width)
    print(found)
    if not asked.trying:
        write("convert_size", found, seeds=[0])


if __name__ == "__main__":
    main()
