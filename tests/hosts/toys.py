"""A tiny regression problem, a tiny language model, and a method that notes every seam's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import sparing
from sparing.core.method import Context, Method

SAMPLES = 10


def table(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """x: (n, 3), y: (n,); x[i, 0] is i, so that a row tells which sample it is."""
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.arange(samples)
    return x, x.sum(1) / samples


@final
class Rows(Dataset[Any]):
    """Map-style."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.x, self.y = table(samples)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


@final
class Whole:
    """Gives whole batches itself."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.x, self.y = table(samples)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


@final
class Centre(nn.Module):
    """Subtracts a running mean: batch norm for batches of any size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().float().mean(0), 0.1)
        return x - self.mean


def small(seed: int = 0) -> nn.Module:
    """With dropout and running statistics: training moves buffers and draws random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(3, 8), Centre(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)
        )


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 1)


def squares(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    outputs = model(batch["x"])[:, 0]
    return (outputs.float() - batch["y"]).square(), outputs


SGD = partial(torch.optim.SGD, lr=0.01)
ADAM = partial(torch.optim.AdamW, lr=0.01)


def session(*methods: Method, model: nn.Module | None = None, **options: Any) -> sparing.Session:
    given = {"data": Whole(), "optimizer": SGD, "losses": squares, "batch_size": 2}
    if not {"epochs", "steps"} & set(options):
        given["epochs"] = 1
    return sparing.Session(small() if model is None else model, methods, **{**given, **options})


def train(
    whole: sparing.Session, until: int | None = None, after: Callable[[], None] | None = None
) -> list[float]:
    """The losses of the micro-batches to the end, or through the optimizer step ``until``."""
    found = []
    for batch, context in whole:
        losses, outputs = whole.forward(batch)
        found.append(whole.step(losses, context, outputs))
        if after is not None:
            after()
        if whole.clock.step == until:
            break
    return found


VOCABULARY, LENGTH = 32, 8


@final
class Texts:
    def __init__(self, samples: int = 24) -> None:
        generator = torch.Generator().manual_seed(2)
        first = torch.randint(VOCABULARY, (samples, 1), generator=generator)
        stride = torch.randint(1, 4, (samples, 1), generator=generator)
        self.ids = (first + stride * torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attention_dropout=0.1,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def next_tokens(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    ids = batch["input_ids"]
    outputs = model(input_ids=ids, use_cache=False)
    logits = outputs.logits[:, :-1].float().transpose(1, 2)
    return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1), outputs


def restless(**options: Any) -> sparing.TopAny:
    """Experts that are judged every other step."""
    adapt = {
        "every": 2,
        "warmup": 0,
        "patience": 1,
        "trial": 1,
        "loss_tolerance": 0.01,
        "margin": 0.0,
        "freeze_after": 1.0,
        "statistics_every": 1,
    }
    return sparing.TopAny(
        max_experts=4, start_experts=2, width=8, calibration=1, adapt=adapt, **options
    )


def language_session(*methods: Method, **options: Any) -> sparing.Session:
    given = {
        "data": Texts(),
        "optimizer": ADAM,
        "losses": next_tokens,
        "batch_size": 2,
        "domain_of": lambda index: index % 2,
        "domains": ("even", "odd"),
        "steps": 12,
    }
    return sparing.Session(llama(), methods, **{**given, **options})


@final
@dataclass(frozen=True, kw_only=True)
class NoOptions:
    pass


class Recorder(Method):
    """Implements every seam and changes nothing."""

    name = "recorder"
    Options = NoOptions
    loss_stage = "batch"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.bound: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": {}}

    def bind(self, **known: Any) -> None:
        self.bound = known
        self.calls.append("bind")

    def prepare(self, model: nn.Module, setup: Any) -> nn.Module:
        self.setup = setup
        self.calls.append("prepare")
        return model

    def optimizer(self, model: nn.Module, groups: Any) -> Any:
        self.calls.append("optimizer")
        return groups

    def order(self, clock: sparing.Clock) -> None:
        self.calls.append("order")

    def batch(self, batch: Any, context: Context) -> Any:
        self.context = context
        self.calls.append("batch")
        return batch

    def loss(self, losses: Tensor, context: Context, outputs: Any) -> Tensor:
        assert losses.ndim == 0
        self.calls.append("loss")
        return losses

    def grads(self, named_parameters: Any, context: Context | None) -> None:
        self.norm = sum(float(p.grad.square().sum()) for _, p in named_parameters) ** 0.5
        self.calls.append("grads")

    def step(self, clock: sparing.Clock, optimizer: Any) -> None:
        self.calls.append(f"step {clock.step}" + (" ends the epoch" if clock.epoch_ended else ""))

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        self.calls.append("evaluating")
        yield
        self.calls.append("evaluated")

    def account(self, ledger: sparing.Ledger) -> None:
        ledger.add("bytes", spent=1, dense=2)
        self.calls.append("account")

    def signals(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def take_events(self) -> list[dict[str, Any]]:
        return [{"kind": "looked"}]

    def state_dict(self) -> dict[str, Any]:
        return {"calls": list(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = list(state["calls"])
