"""Makes the tiny encoder of the text task, by prediction of masked bytes:

    python scripts/pretrain_text_encoder.py

Writes src/sparing/tasks/text/data/tiny.safetensors. On one core it takes a minute; on the same
machine, with the same versions of torch and of Python's library, it gives the same bytes again.

Text: the training parts of the language task's three domains, as many rows of each, without any
occurrence of a passage that the text task evaluates on (development and test). A row is 32, 64 or
128 tokens long, so that all positions are trained. Objective: 15 % of the bytes are hidden, of
which 80 % become the padding id, which stands for nothing, 10 % another byte, 10 % stay (Devlin et
al. 2019, BERT).
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertForMaskedLM

from sparing.tasks.text import encoders, sources
from sparing.tasks.text.split import split
from sparing.tasks.text.tokens import BEGIN, BYTE_VOCABULARY, FIRST_BYTE, PAD
from sparing.updates.muon import Muon

SEED = 0
STEPS = 500
TOKENS = 2048
LENGTHS = (32, 32, 64, 128)
HIDDEN = 0.15
RATES = {"muon": 0.01, "adamw": 2e-3}
WARMUP = 0.05
TABLE = 0.1
"""Standard deviation of the tables' first values."""

Bytes = NDArray[np.uint8]


def texts() -> dict[str, Bytes]:
    """By domain, the training text as the passages are cut from it, without the held-out ones."""
    source = sources.load("passages")
    parts = split(source.keys, source.data.labels)
    held_out = torch.cat((parts.development, parts.test))
    found = {}
    for label, domain in enumerate(sources.PASSAGES):
        whole = sources.running(domain)
        mine = held_out[source.data.labels[held_out] == label]
        kept = without(whole, set(source.data.take(mine).texts))
        found[domain] = np.frombuffer(kept.encode(), dtype=np.uint8)
        print(f"{domain}: {len(found[domain]):,} of {len(whole.encode()):,} bytes", flush=True)
    return found


def without(whole: str, passages: set[str]) -> str:
    """``whole`` with each occurrence of a passage replaced by a space."""
    for passage in sorted(passages, key=len, reverse=True):
        whole = whole.replace(passage, " ")
    return whole


def rows(data: dict[str, Bytes], length: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """(B, length): the mark of the beginning and bytes, as many rows of each domain."""
    count = TOKENS // length
    found = np.full((count, length), BEGIN, dtype=np.int64)
    domains = list(data.values())
    for i in range(count):
        text = domains[i % len(domains)]
        start = draw.integers(len(text) - length)
        found[i, 1:] = text[start : start + length - 1].astype(np.int64) + FIRST_BYTE
    return found


def batch(data: dict[str, Bytes], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Ids as the encoder gets them, and what they were where hidden, else -100: (B, S) each."""
    ids = rows(data, int(draw.choice(LENGTHS)), draw)
    asked = draw.random(ids.shape) < HIDDEN
    asked[:, 0] = False
    how = draw.random(ids.shape)
    other = draw.integers(FIRST_BYTE, BYTE_VOCABULARY, ids.shape)
    seen = np.where(asked & (how < 0.8), PAD, np.where(asked & (how < 0.9), other, ids))
    return torch.from_numpy(seen), torch.from_numpy(np.where(asked, ids, -100))


@torch.no_grad()
def start_(model: BertForMaskedLM) -> None:
    """Tables that the first steps do not drown, and places that tell how far apart they are.

    With learned positions from N(0, 0.02) the model stays at the frequencies of single bytes for
    long; from sines (Vaswani et al. 2017, section 3.5) attention finds neighbours soon.
    """
    tables = model.bert.embeddings
    tables.word_embeddings.weight.normal_(std=TABLE)[PAD] = 0
    places = tables.position_embeddings.weight  # (positions, d)
    count, width = places.shape
    angle = torch.arange(count)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    places.copy_(torch.stack((angle.sin(), angle.cos()), -1).flatten(1) * 2**0.5 * TABLE)


def optimizer(model: nn.Module) -> Muon:
    """Muon for the layers' matrices, AdamW for tables, biases, norms and the head."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = ".encoder.layer." in name and parameter.ndim == 2
        (matrices if inner else rest).append(parameter)
    return Muon(
        [
            {"params": matrices, "rule": "muon", "lr": RATES["muon"]},
            {"params": rest, "rule": "adamw", "lr": RATES["adamw"]},
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny encoder of the text task.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=encoders.WEIGHTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    draw = np.random.default_rng(SEED)
    config = encoders.tiny_config()
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForMaskedLM(config).train()
    start_(model)
    rule = optimizer(model)
    data = texts()
    begun, lately = time.process_time(), []
    for step in range(chosen.steps):
        done = step / chosen.steps
        for group in rule.param_groups:
            group["lr"] = RATES[group["rule"]] * min(1.0, done / WARMUP + 1e-3, (1 - done) * 1.25)
        ids, labels = batch(data, draw)
        # every id stands for a place: what is hidden is no padding
        states = model.bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        asked = labels != -100
        loss = F.cross_entropy(model.cls(states[asked]), labels[asked])
        loss.backward()
        rule.step()
        rule.zero_grad()
        lately.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}: {np.mean(lately) / np.log(2):.3f} bits a hidden byte, "
                f"{time.process_time() - begun:.0f} s of one core",
                flush=True,
            )
            lately.clear()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {k: v.detach().half().contiguous() for k, v in model.bert.state_dict().items()}
    save_file(kept, chosen.out)
    content = chosen.out.read_bytes()
    print(f"{chosen.out}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
