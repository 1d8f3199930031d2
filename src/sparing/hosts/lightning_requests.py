"""What the Lightning callback refuses, each with the way out, and what it reads of a setup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from sparing.core.errors import RequestError
from sparing.core.method import Method, implements


def check(trainer: Any, module: Any, methods: list[Method]) -> None:
    """Raise RequestError if this trainer cannot fit this module with these methods."""
    if not type(trainer).__module__.startswith("lightning."):
        raise RequestError(
            f"this callback is one of lightning.pytorch, the trainer of {type(trainer).__module__};"
            " import both from lightning.pytorch"
        )
    if not module.automatic_optimization:
        raise RequestError(
            "with automatic_optimization = False the loop is yours, and no seam reaches its steps; "
            "use sparing.Session, or automatic optimization"
        )
    planning = [m.name for m in methods if implements(m, "order")]
    if planning and trainer.max_steps > 0:
        raise RequestError(
            f'"{planning[0]}" plans whole epochs, each as long as what it keeps, and max_steps='
            f"{trainer.max_steps} would cut them; give the trainer max_epochs alone"
        )
    if trainer.overfit_batches:
        raise RequestError(
            "overfit_batches replaces the order of samples, which is the methods' plan here; leave "
            "it out, or give a data set of a few samples"
        )


def only(loader: Any) -> DataLoader[Any]:
    """The one training loader; RequestError for what is no map-style DataLoader."""
    if not isinstance(loader, DataLoader):
        raise RequestError(
            f"training data must come as one torch DataLoader, got a {type(loader).__name__}; "
            "methods choose samples by their index in its data set"
        )
    data: Any = loader.dataset
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise RequestError(
            f"the training data set, a {type(data).__name__}, is a stream: it has no samples by "
            "index, so none can be chosen or left out. Load it as a map-style data set, or choose "
            "within the stream before it reaches the loader"
        )
    if not hasattr(data, "__len__"):
        raise RequestError(f"the training data set, a {type(data).__name__}, needs a __len__")
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise RequestError(
            "the training loader has a batch sampler of its own, and batches are those of the plan "
            "here; give it batch_size= instead"
        )
    return loader


def order(loader: DataLoader[Any], epoch: int, generator: torch.Generator) -> Tensor:
    """The samples of an epoch as ``loader`` would give them; a shuffle draws from ``generator``."""
    sampler: Any = loader.sampler
    size = len(loader.dataset)  # type: ignore[arg-type]
    if type(sampler) is SequentialSampler:
        return torch.arange(size)
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == size:
        return torch.randperm(size, generator=generator)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return torch.tensor(list(sampler), dtype=torch.int64)


def model_of(module: nn.Module) -> nn.Module:
    """The one child that holds all parameters, which methods then know by its own names; else all.

    A model of transformers tells by its configuration how fresh weights are drawn.
    """
    name = _model_name(module)
    return module if name is None else module.get_submodule(name)


def replace_model_(module: nn.Module, prepared: nn.Module) -> bool:
    """Put a prepared model where ``model_of`` found it; False if it was the module itself."""
    name = _model_name(module)
    if name is not None:
        setattr(module, name, prepared)
    return name is not None or prepared is module


def _model_name(module: nn.Module) -> str | None:
    holding = [
        name
        for name, child in module.named_children()
        if next(child.parameters(), None) is not None
    ]
    own = next(module.parameters(recurse=False), None)
    return holding[0] if len(holding) == 1 and own is None else None


def dtype(precision: str) -> torch.dtype:
    """What ``Trainer(precision=...)`` computes in."""
    named = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return named.get(str(precision).split("-")[0], torch.float32)


def optimizers(built: Any) -> Iterator[torch.optim.Optimizer]:
    """The optimizers in what ``configure_optimizers`` returned."""
    if isinstance(built, torch.optim.Optimizer):
        yield built
    elif isinstance(built, Mapping):
        yield from optimizers(built.get("optimizer"))
    elif isinstance(built, list | tuple):
        for part in built:
            yield from optimizers(part)


def check_schedule(built: Any, before: int, after: int) -> None:
    """Raise RequestError if groups came or went under a schedule that was built on them."""
    if before != after and any(_schedules(built)):
        raise RequestError(
            f"methods made {after} parameter groups of {before}, and configure_optimizers had "
            "built a schedule of the learning rate for those before; return the optimizer alone"
        )


def _schedules(built: Any) -> Iterator[bool]:
    if isinstance(built, LRScheduler):
        yield True
    elif isinstance(built, Mapping):
        yield from _schedules(list(built.values()))
    elif isinstance(built, list | tuple):
        for part in built:
            yield from _schedules(part)
