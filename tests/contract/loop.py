"""The plainest loop that calls every seam of a method, on a tiny language model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from sparing.core import ranks
from sparing.core.clock import Clock
from sparing.core.ledger import Ledger
from sparing.core.method import Context, Method, Setup
from sparing.core.recompute import recomputing

SAMPLES, LENGTH, VOCABULARY, BATCH = 32, 12, 48, 4
STEPS_PER_EPOCH = SAMPLES // BATCH

# options that make a method act within a few steps, beside its defaults; one entry a method
CASES: dict[str, list[dict[str, Any]]] = {
    "dynmoe": [
        {},
        {
            "published": True,
            "max_experts": 4,
            "start_experts": 2,
            "adapt": {"every": 2, "warmup": 0, "freeze_after": 1.0},
        },
        {
            "max_experts": 6,
            "start_experts": 3,
            "target_k": 1.5,
            "calibration": 1,
            "adapt": {
                "every": 2,
                "warmup": 0,
                "patience": 1,
                "trial": 1,
                "loss_tolerance": 0.01,
                "margin": 0.0,
                "freeze_after": 1.0,
                "statistics_every": 1,
            },
        },
    ],
    "top-k": [
        {},
        {"experts": 4, "k": 1},
        {"experts": 6, "k": 2, "groups": 3, "groups_kept": 2},
        {"experts": 4, "k": 3, "null_experts": 2, "null_kind": "constant"},
        {"experts": 4, "shared": 2, "residual": True, "residual_coefficient": True},
    ],
    "top-p": [
        {},
        {"experts": 4, "target_k": 2.0, "max_k": 3, "calibration": 2},
        {"experts": 4, "target_k": 1.5, "null_experts": 3, "null_kind": "copy", "normalize": True},
    ],
    "relu": [
        {},
        {
            "experts": 4,
            "target_k": 1.0,
            "start": "calibrated",
            "calibration": 2,
            "coefficient": 0.01,
            "penalty": "plain",
        },
        {"fallback": "zero", "coefficient": 1.0, "factor": 1.5, "normalize": True},
    ],
    "noisy-top-k": [{}, {"experts": 4, "k": 2, "noise_floor": 0.5, "losses": {"load": 0.1}}],
    "sigmoid-top-k": [
        {},
        {"experts": 6, "k": 3, "rate": 0.05, "groups": 3, "groups_kept": 2, "scale": 2.5},
        {"k": 1, "update": "proportional", "losses": {"balance": 0.01}},
    ],
    "expert-choice": [{}, {"experts": 4, "k": 1.5, "fallback": "top-k", "losses": {"z": 0.01}}],
    "random": [{}, {"experts": 4, "k": 1.3}],
    "hash": [{}, {"experts": 4, "k": 2, "by": "input"}],
    "switch": [{}, {"experts": 4, "jitter": 0.3}],
    "infobatch": [{}, {"ratio": 0.7, "delta": 1.0, "normalise": "none"}, {"normalise": "batch"}],
    "quantiles": [{}, {"borders": [0.3], "keep": [0.5, 1.0], "delta": 1.0, "normalise": "none"}],
    "ucb": [{}, {"ratio": 0.3, "every": 1, "width": 2.0, "delta": 1.0}],
    "seta": [{}, {"ratio": 0.2, "groups": 3, "window": 0.7, "delta": 1.0}],
    "random-samples": [{}, {"lengths": [30, 13]}, {"ratio": 0.5, "delta": 0.5}],
    "gain-proportional": [{}, {"strength": 0.5, "share": 0.6, "rescale": True}],
    "two-phase": [{}, {"strength": 2.0, "rescale": True}],
    "mix": [
        {},
        {"rule": "none"},
        {"rule": "temperature", "temperature": 3.0, "share": 0.6},
        {"rule": "sheared", "form": "released", "reference": [1.0, 3.0], "every": 3},
        {
            "rule": "reference-loss",
            "reference": {"odd": 2.0, "even": 3.0},
            "every": 2,
            "losses": "probe",
            "probe_samples": 5,
        },
        {"rule": "random", "every": None},
        {"rule": "random", "every": 2, "weights": [3, 1]},
    ],
    "coreset": [{}, {"ratio": 0.3, "hard": False}],
    "convert": [
        {},
        {
            "experts": 4,
            "method": "coactivation",
            "gate": "distilled",
            "compensate": "mean",
            "sequences": 8,
        },
        {"experts": 4, "method": "gradient", "residual": 1, "clusters": "tokens", "sequences": 8},
        {"experts": 3, "method": "cut", "active": 1, "sequences": 8},
        {
            "experts": 4,
            "router": "dynmoe",
            "text": "own",
            "scale": "calibrated",
            "sequences": 4,
            "length": 8,
        },
    ],
    "growth": [
        {},
        {"keep": 0.5, "rule": "published", "arrival": "by class", "label_issues": False},
        {"keep": 1.0, "sampling": "two-phase", "k": 2},
        {"keep": 0.4, "sampling": "proportional", "duplicates": 0.3, "arrival": "shuffled"},
        {"keep": 0.5, "rule": "random", "duplicates": 0.0},
    ],
    "sparse-adapter": [
        {},
        {"kind": "lora", "rank": 4, "targets": "all-linear", "keep": 0.3, "scope": "layer"},
        {"kind": "houlsby", "width": 4, "score": "er", "keep": 0.2},
        {"kind": "mam", "width": 4, "length": 3, "pattern": "unit", "keep": 0.5},
        {"kind": "prefix", "length": 3, "zero_start": False, "score": "random"},
        {"kind": "lora", "rank": 4, "score": "random", "keep": 0.5},
    ],
    "peft": [{}, {"kind": "shira", "r": 2, "targets": "all-linear"}, {"r": 4, "alpha": 16.0}],
    "cowclip": [
        {},
        {"per": "table", "mode": "dense", "bound": 0.001, "ratio": 0.01, "l2": 0.001},
        {"form": "fixed", "mode": "rows", "published": True, "bound": 0.01, "reduce": "rows"},
        {"ratio": 0.001, "bound": 0.0001, "table_lr": 0.01, "table_decay": 0.0, "by_frequency": 1},
    ],
}


def dense(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tokens(seed: int = 0) -> Tensor:
    """(SAMPLES, LENGTH) int64, with some structure to learn."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCABULARY, (SAMPLES, 1), generator=generator)
    stride = torch.randint(1, 5, (SAMPLES, 1), generator=generator)
    return (first + stride * torch.arange(LENGTH)) % VOCABULARY


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """One loss a sample, (B,)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return each.mean(1)


def whole_checkpoint(forward: Any, *arguments: Any, **named: Any) -> Any:
    """Checkpoint a block and recompute all of it, not only up to the last tensor that is needed.

    An early stop would spare what follows that tensor, and hide whatever counts there.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(forward, *arguments, use_reentrant=False, **named)


class Loop:
    """Trains with one method, or none; the data's seed may differ between ranks."""

    def __init__(self, method: Method | None, *, data_seed: int = 0, checkpointing: bool = False):
        self.methods = [] if method is None else [method]
        self.clock = Clock(steps=2 * STEPS_PER_EPOCH, epochs=2)
        self.ledger = Ledger()
        self.data = tokens(data_seed)
        self.domain = torch.arange(SAMPLES) % 2
        self.events: list[dict[str, Any]] = []
        self.order, self.place = torch.arange(SAMPLES), SAMPLES
        self.model = dense()
        setup = Setup(
            seed=3,
            steps=self.clock.steps,
            world_size=ranks.world_size(),
            batches=lambda: self.data.split(BATCH),
            loss=lambda model, ids: losses_of(model, ids).mean(),
            read=lambda index: self.data[index],
            size=SAMPLES,
            domain_of=lambda index: self.domain[index],
            domains=("even", "odd"),
        )
        groups: list[dict[str, Any]] = []
        for part in self.methods:
            self.model = part.prepare(self.model, setup)
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        for part in self.methods:
            groups = part.optimizer(self.model, groups)
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)
        self.recomputed = 0
        if checkpointing:
            for block in self.model.model.layers:
                block.forward = partial(whole_checkpoint, block.forward)
                block.mlp.register_forward_pre_hook(self._notice)
        self.bind()
        self.model.train()

    def _notice(self, module: nn.Module, arguments: Any) -> None:
        self.recomputed += recomputing()

    def bind(self) -> None:
        for part in self.methods:
            part.bind(
                size=SAMPLES, epochs=2, steps=self.clock.steps, seed=3, model=self.model,
                probe=self.probe,
            )  # fmt: skip

    def evaluate(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            loss = losses_of(self.model, self.data[:6]).mean()
        self.model.train()
        return loss

    def probe(self) -> Tensor:
        loss = self.evaluate()
        ranks.mean_([loss])
        return loss

    def run(self, steps: int, *, evaluate: bool = False) -> Loop:
        for _ in range(steps):
            if self.place >= len(self.order):
                plans = [plan for part in self.methods if (plan := part.order(self.clock))]
                self.order, self.place = plans[0].index if plans else torch.arange(SAMPLES), 0
                self.clock.dealt = 0
            self._step(self.order[self.place : self.place + BATCH])
            if evaluate:
                self.evaluate()
            self.place += BATCH
            if self.place < len(self.order) and any(m.replans(self.clock) for m in self.methods):
                self.clock.dealt = self.place
                (self.order,) = (p.index for m in self.methods if (p := m.order(self.clock)))
            if self.place >= len(self.order):
                self.clock.epoch_ended = True
                for part in self.methods:
                    part.step(self.clock, self.optimizer)
                self.clock.epoch_ended = False
                self.clock.epoch += 1
        return self

    def _step(self, index: Tensor) -> None:
        context = Context.of(index, domain=self.domain[index], extra={"domains": ("even", "odd")})
        batch: Any = self.data[index]
        for part in self.methods:
            batch = part.batch(batch, context)
        losses = losses_of(self.model, batch)
        for stage in ("sample", "weight", "batch"):
            if stage == "batch":
                losses = losses.mean()
            for part in self.methods:
                if part.loss_stage == stage:
                    losses = part.loss(losses, context, None)
        self.optimizer.zero_grad()
        losses.backward()
        ranks.mean_([p.grad for p in self.model.parameters() if p.grad is not None])
        for part in self.methods:
            part.grads(self.model.named_parameters(), context)
        self.optimizer.step()
        self.clock.step += 1
        self.clock.samples += BATCH
        for part in self.methods:
            part.step(self.clock, self.optimizer)
            part.account(self.ledger)
            self.events += part.take_events()

    def state_dict(self) -> dict[str, Any]:
        """All that a host keeps."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "methods": [part.state_dict() for part in self.methods],
            "clock": self.clock.state_dict(),
            "ledger": self.ledger.state_dict(),
            "order": self.order,
            "place": self.place,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for part, own in zip(self.methods, state["methods"], strict=True):
            part.load_state_dict(own)
        self.clock.load_state_dict(state["clock"])
        self.ledger.load_state_dict(state["ledger"])
        self.order, self.place = state["order"], state["place"]

    def outcome(self) -> dict[str, Any]:
        """All that must come out the same wherever training was the same."""
        return {**self.state_dict(), "signals": [part.signals() for part in self.methods]}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two outcomes differ, bit for bit; empty if nowhere."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return [f"{path}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"]
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return [] if raw[0].equal(raw[1]) else [f"{path}: tensors differ"]
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{path}: keys {list(a)} and {list(b)}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in differences(x, y, f"{path}/{i}")]
    return [] if repr(a) == repr(b) and type(a) is type(b) else [f"{path}: {a!r} and {b!r}"]
