"""Threads of the search: whole parts of the rows to each, none within a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

One = TypeVar("One")
Made = TypeVar("Made")


@contextmanager
def one_thread() -> Iterator[int]:
    """Within, torch works in the caller's thread alone. Gives how many threads it had.

    Products of a search are too small to be shared out; and a thread of OpenMP that has done its
    share waits for more in a loop, for some milliseconds, in which another one could use its core.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_threads(work: Callable[[One], Made], parts: Sequence[One], threads: int) -> list[Any]:
    """``work`` of each part, in order; at most so many at once."""
    if threads == 1 or len(parts) < 2:
        return [work(part) for part in parts]
    # what a thread of torch's begins with may be more than one
    with ThreadPoolExecutor(
        min(threads, len(parts)), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(work, parts))
