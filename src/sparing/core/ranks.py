"""Agreement between ranks: every function is a no-op, or the obvious value, in a single process.

All ranks must make the same calls in the same order. A sum is reduced once and its result sent to
all, so that every rank holds the same bits and takes the same decision from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparing.core.errors import RunError


def distributed() -> bool:
    """Whether a process group exists and has more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _device() -> torch.device:
    """Where the process group's backend wants its tensors."""
    if "nccl" in dist.get_backend() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@torch.no_grad()
def sum_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over the ranks.

    One all-reduce for all of them, in float64: counts are exact up to 2**53. Shapes and dtypes
    may differ between tensors; they must not differ between ranks.
    """
    parts = list(tensors)
    if not distributed() or not parts:
        return
    device = _device()
    flat = torch.cat([part.detach().reshape(-1).to(device, torch.float64) for part in parts])
    dist.all_reduce(flat)
    pieces = torch.split(flat, [part.numel() for part in parts])
    for part, piece in zip(parts, pieces, strict=True):
        part.copy_(piece.reshape(part.shape))


@torch.no_grad()
def mean_(tensors: Iterable[Tensor]) -> None:
    """Replace each floating-point tensor, in place, by its mean over the ranks (one all-reduce)."""
    parts = list(tensors)
    if not distributed() or not parts:
        return
    wide = [part.detach().to(torch.float64) for part in parts]
    sum_(wide)
    for part, total in zip(parts, wide, strict=True):
        part.copy_(total / world_size())


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by rank 0's, bit for bit, whatever its dtype or layout."""
    parts = list(tensors)
    if not distributed() or not parts:
        return
    device = _device()
    # bytes, not float64: a generator's state or an int64 hash must arrive unrounded
    raw = [part.detach().contiguous().reshape(-1).view(torch.uint8).to(device) for part in parts]
    flat = torch.cat(raw)
    dist.broadcast(flat, src=0)
    pieces = torch.split(flat, [piece.numel() for piece in raw])
    for part, piece in zip(parts, pieces, strict=True):
        # clone: a piece may begin at an offset that its dtype's alignment forbids
        part.copy_(piece.clone().view(part.dtype).reshape(part.shape))


def _digest(value: Any) -> str:
    """A short text that is equal on two ranks exactly if the value is."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        body = hashlib.sha256(raw).hexdigest()[:16]
        return f"{value.dtype} of shape {tuple(value.shape)}, sha256 {body}"
    text = repr(value)
    if len(text) <= 120:
        return text
    return f"{text[:80]}..., sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def gather(value: Any) -> list[Any]:
    """The small picklable value of every rank, by rank; all ranks must call it."""
    if not distributed():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def agree(name: str, value: Any) -> None:
    """Check that ``value``, a tensor or a value with a telling ``repr``, is the same on all ranks.

    Raises RunError, on every rank alike, naming what each one holds.
    """
    if not distributed():
        return
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, _digest(value))
    if len(set(held)) > 1:
        listing = "; ".join(f"rank {number}: {text}" for number, text in enumerate(held))
        raise RunError(
            f"the ranks do not agree on {name} ({listing}); start all of them with the same "
            f"recipe, seed, data and code"
        )


@torch.no_grad()
def gather_rows(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors of every rank, by rank, on the CPU; their first dimension may differ by rank.

    Bits arrive unchanged whatever the dtype. All ranks must call it with as many tensors, of the
    same dtypes and further dimensions.
    """
    own = [tensor.detach().cpu().contiguous() for tensor in tensors]
    if not distributed():
        return [own]
    device = _device()
    here = torch.tensor([len(tensor) for tensor in own], dtype=torch.int64, device=device)
    counts = [torch.zeros_like(here) for _ in range(world_size())]
    dist.all_gather(counts, here)
    found: list[list[Tensor]] = [[] for _ in range(world_size())]
    for number, tensor in enumerate(own):
        most = max(int(count[number]) for count in counts)
        # nothing of a numpy array has strides that cannot be viewed as bytes
        flat = tensor.reshape(-1) if tensor.numel() else torch.zeros(0, dtype=tensor.dtype)
        bytes_ = flat.view(torch.uint8)
        row = tensor[:1].nbytes if len(tensor) else tensor.new_zeros(1, *tensor.shape[1:]).nbytes
        padded = torch.zeros(most * row, dtype=torch.uint8, device=device)
        padded[: bytes_.numel()] = bytes_.to(device)
        parts = [torch.zeros_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
        for rank_, part in enumerate(parts):
            count = int(counts[rank_][number])
            body = part[: count * row].cpu().clone()
            found[rank_].append(body.view(tensor.dtype).reshape(count, *tensor.shape[1:]))
    return found
