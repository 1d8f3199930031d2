"""How much memory an object holds: all arrays, tensors and Python objects that it leads to."""

from __future__ import annotations

import gc
import sys
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

_SHARED = (type, CodeType, FrameType, FunctionType, ModuleType)
"""What belongs to the program, not to the object."""


def held(thing: Any) -> int:
    """Bytes, each object's once; files that are mapped are not counted."""
    seen: set[int] = set()
    waiting, total = [thing], 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _SHARED):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
            continue
        total += sys.getsizeof(one)  # of an array that owns its memory with it
        if isinstance(one, np.ndarray) and one.base is not None:
            waiting.append(one.base)
        waiting += gc.get_referents(one)
    return total


def of_index(pool: Any) -> int:
    """Bytes of the vectors and codes that a pool's exact search holds."""
    return sum(t.untyped_storage().nbytes() for t in pool._members.main.index.inner.rows.tensors)


def besides(pool: Any) -> int:
    """Bytes that a pool on the disk holds besides vectors and the index's own codes."""
    return held(pool) - of_index(pool)
