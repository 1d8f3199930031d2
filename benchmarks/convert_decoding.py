"""Generation from a converted model: with a cache as without, and how fast beside transformers.

    python benchmarks/convert_decoding.py [--repetitions 9] [--tokens 64] [--models stories smollm2]

Models: stories260k, converted (8 experts, 2 active), and a LLaMA of SmolLM2-135M's shape with
random weights. Each is written twice from the same seed: as Mixtral, which transformers runs with
its own layers, by each implementation that it has, and in the form that sparing.load reads. First,
on each: that greedy generation with a cache equals that without, token by token, and that both
forms give the same tokens. Then a prompt of 8 tokens is continued by --tokens tokens, in turns,
evaluation mode, one thread: medians of CPU seconds of one generation, and ratios to the fastest of
transformers' own. Writes benchmarks/records/convert_decoding.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparing
from record import in_turns, summary, write
from sparing.convert import Conversion, convert
from sparing.core.quiet import quietly

STORIES = Path(sparing.__file__).parent / "tasks" / "language" / "data" / "stories260k"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def smollm_shape(folder: Path) -> Path:
    """A LLaMA of the shape of SmolLM2-135M with random weights, in ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def generated(model: Any, prompt: Tensor, tokens: int, cache: bool = True) -> Tensor:
    """The greedy continuation of (1, S) by exactly so many tokens."""
    found: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )
    return found


def measure(dense: Path, folder: Path, repetitions: int, tokens: int) -> dict[str, Any]:
    """Equality and times for one dense model."""
    from transformers import AutoModelForCausalLM

    paths = {}
    for form in ("export", "sparing"):
        paths[form] = folder / form
        convert(dense, paths[form], Conversion(experts=8, active=2, form=form))  # type: ignore[arg-type]
    models: dict[str, Any] = {"sparing": sparing.load(paths["sparing"])}
    for kind in IMPLEMENTATIONS:
        with quietly():
            models[f"transformers {kind}"] = AutoModelForCausalLM.from_pretrained(
                paths["export"], experts_implementation=kind, dtype=torch.float32
            ).eval()
    prompt = torch.arange(3, 11)[None]
    said = {name: generated(model, prompt, tokens) for name, model in models.items()}
    cached = {
        name: bool(torch.equal(said[name], generated(model, prompt, tokens, cache=False)))
        for name, model in models.items()
    }
    times = in_turns(
        {
            name: (lambda model=model: generated(model, prompt, tokens))  # type: ignore[misc]
            for name, model in models.items()
        },
        repetitions=repetitions,
    )
    medians = {name: summary(times, name)[name]["cpu"]["median"] for name in models}
    fastest = min((n for n in models if n.startswith("transformers")), key=medians.__getitem__)
    return {
        "cached equals uncached": cached,
        "same tokens as transformers": bool(torch.equal(said["sparing"], said[fastest])),
        "fastest of transformers": fastest,
        "over the fastest of transformers": {
            name: round(median / medians[fastest], 3) for name, median in medians.items()
        },
        "times": summary(times, fastest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=["stories", "smollm2"])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--try", dest="trying", action="store_true", help="write no record")
    asked = parser.parse_args()
    results: dict[str, Any] = {"tokens": asked.tokens}
    for name in asked.models:
        with tempfile.TemporaryDirectory(dir=asked.folder) as made:
            folder = Path(made)
            dense = STORIES if name == "stories" else smollm_shape(folder / "dense")
            found = measure(dense, folder, asked.repetitions, asked.tokens)
        results["stories260k" if name == "stories" else "SmolLM2-135M's shape"] = found
        print(name, {key: value for key, value in found.items() if key != "times"}, flush=True)
        if not asked.trying:
            write("convert_decoding", results, seeds=[0])


if __name__ == "__main__":
    main()
