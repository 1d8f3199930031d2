"""Batches of a plan: the sample's identity travels with the batch, never by position."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sparing.core.errors import RequestError
from sparing.core.method import Context, Plan


@final
class _Numbered(Dataset[Any]):
    """Gives each sample together with its index and its place in the plan."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, int, Any]:
        position, index = place
        return position, index, self.data[index]


@final
class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[tuple[int, int, Any]]) -> tuple[Tensor, Tensor, Any]:
        positions, indices, samples = zip(*rows, strict=True)
        return torch.tensor(positions), torch.tensor(indices), self.collate(list(samples))


def count(samples: int, batch_size: int, world: int = 1) -> int:
    """Micro-batches of each rank: of the last samples, up to world - 1 cannot be shared equally."""
    return -(-(samples - samples % world) // (batch_size * world))


def share(number: int, samples: int, batch_size: int, rank: int = 0, world: int = 1) -> slice:
    """The places in a plan of ``samples`` that this rank takes in micro-batch ``number``.

    Every rank gets the same number of micro-batches, of the same sizes.
    """
    first = number * batch_size * world
    each = (min(samples - samples % world, first + batch_size * world) - first) // world
    return slice(first + rank * each, first + (rank + 1) * each)


def gives_batches(data: Any) -> bool:
    """Whether ``data`` has a method ``batch(index)``.

    The ``batch(batch_size)`` of Hugging Face's data sets and of data pipes is another thing.
    """
    method = getattr(data, "batch", None)
    if not callable(method):
        return False
    return next(iter(inspect.signature(method).parameters), None) != "batch_size"


@final
class _Order(Sampler[list[tuple[int, int]]]):
    """Yields a micro-batch's (place, index) pairs when it is its turn, not all at once."""

    def __init__(self, plan: Callable[[], Plan], groups: list[slice]) -> None:
        self.plan, self.groups = plan, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for group in self.groups:
            yield list(enumerate(self.plan().index[group].tolist(), start=group.start))


def prefetched(data: Any, *, workers: int = 0, **loader: Any) -> int:
    """Micro-batches that a loader asks for before they are its turn: of each rank.

    None of data that gives whole batches or is read in this process; ``prefetch_factor`` (2 if not
    given) for each worker.
    """
    return 0 if gives_batches(data) else workers * int(loader.get("prefetch_factor") or 2)


def batches(
    data: Any,
    plan: Plan | Callable[[], Plan],
    *,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    collate: Callable[[list[Any]], Any] = default_collate,
    workers: int = 0,
    seed: int = 0,
    **loader: Any,
) -> Iterator[tuple[Any, Context]]:
    """The plan's micro-batches from number ``start`` on, before ``stop``, each with its context.

    A data set with a method ``batch(index)`` gives whole batches itself; any other map-style data
    set is read through a DataLoader, by ``workers`` processes if asked, whose own generators
    start from ``seed``; ``loader`` are further options of that DataLoader. A function gives the
    plan as it is now: one that is changed before a micro-batch's turn counts from it on.
    """
    now = plan if callable(plan) else lambda: plan
    first = now()
    numbers = range(start, count(len(first), batch_size, world) if stop is None else stop)
    groups = [share(number, len(first), batch_size, rank, world) for number in numbers]
    if gives_batches(data):
        for group in groups:
            index, weight = now().index[group].long(), now().weight
            yield data.batch(index), _context(index, None if weight is None else weight[group])
        return
    if first.index.ndim == 2:
        raise RequestError(
            "a plan of pairs needs a data set that gives whole batches: a method batch(index)"
        )
    source: DataLoader[Any] = DataLoader(
        _Numbered(data),
        batch_sampler=_Order(now, groups),
        collate_fn=_Collate(collate),
        num_workers=workers,
        # the workers' base seed: not drawn from the global generator
        generator=torch.Generator().manual_seed(seed),
        **loader,
    )
    for places, index, batch in source:
        weight = now().weight
        yield batch, _context(index, None if weight is None else weight[places])


def read(data: Any, index: Tensor, collate: Callable[[list[Any]], Any] = default_collate) -> Any:
    """The samples ``index``, (B,) int64, as one batch, in this process, not augmented.

    That is what ``plain(index)`` gives of a data set that gives batches itself.
    """
    if gives_batches(data) and callable(plain := getattr(data, "plain", None)):
        return plain(index)
    return next(batches(data, Plan(index), batch_size=len(index), collate=collate))[0]


def domains_of(data: Any) -> tuple[Callable[[Tensor], Tensor] | None, tuple[str, ...]]:
    """``domain_of(index)`` and ``domains`` of a data set that has both, else None and ()."""
    tell, names = getattr(data, "domain_of", None), getattr(data, "domains", None)
    known = callable(tell) and isinstance(names, tuple | list)
    return (tell, tuple(map(str, names or ()))) if known else (None, ())


def _context(index: Tensor, weight: Tensor | None) -> Context:
    return Context.of(index, weight=weight)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move all tensors of a nested batch."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return _like(batch, (to_device(value, device) for value in batch))
    return batch


def first_rows(batch: Any, rows: int, of: int) -> Any:
    """The first ``rows`` of a nested batch whose tensors have ``of`` rows."""
    if isinstance(batch, Tensor):
        return batch[:rows] if batch.ndim and batch.shape[0] == of else batch
    if isinstance(batch, Mapping):
        return {key: first_rows(value, rows, of) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return _like(batch, (first_rows(value, rows, of) for value in batch))
    return batch


def _like(sequence: Any, values: Iterable[Any]) -> Any:
    """A list, tuple or named tuple as ``sequence`` is one, of other values."""
    kind = type(sequence)
    return kind(*values) if hasattr(sequence, "_fields") else kind(values)


def token_count(batch: Any, context: Context) -> int:
    """Real tokens of a batch: of its mask, else its ``input_ids``, else one for each sample."""
    if context.mask is not None:
        return int(context.mask.sum())
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return int(ids.numel()) if isinstance(ids, Tensor) else int(context.index.shape[0])


def rows(batch: Any) -> int:
    """The rows of a nested batch: those of its first tensor."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0])
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next(
        rows(value) for value in values if isinstance(value, Tensor | Mapping | list | tuple)
    )


def shapes(batch: Any) -> Any:
    """The shapes of a nested batch's tensors, hashable."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    if isinstance(batch, Mapping):
        return tuple((key, shapes(value)) for key, value in batch.items())
    if isinstance(batch, list | tuple):
        return tuple(shapes(value) for value in batch)
    return None


def whose(bad: Tensor, context: Context, domains: tuple[str, ...]) -> str:
    """The samples and domains of the rows where ``bad``, (B,) bool, or of all where none is."""
    at = bad.nonzero().flatten().tolist() or list(range(bad.numel()))
    told = f"samples {context.index[at].flatten().tolist()[:8]}"
    if context.domain is not None and domains:
        told += " of " + ", ".join(sorted({domains[int(d)] for d in context.domain[at]}))
    return told


def reading(loader: Any, *, seed: int, workers: int | None, pin_memory: bool) -> dict[str, Any]:
    """How a torch DataLoader reads its data set, as keywords of ``batches``.

    ``workers``: other than its own, if given; ``seed``: of theirs.
    """
    workers = loader.num_workers if workers is None else workers
    parallel = ("prefetch_factor", "multiprocessing_context", "worker_init_fn")
    return {
        "data": loader.dataset,
        "collate": loader.collate_fn,
        "workers": workers,
        "seed": seed,
        "pin_memory": pin_memory,
        **({name: getattr(loader, name) for name in parallel} if workers else {}),
    }
