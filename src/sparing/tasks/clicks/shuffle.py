"""Batches of one epoch in an order that (seed, epoch) alone decides, from any position on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.tasks.clicks.encoded import Encoded, joined, tensors

_AHEAD = 8
"""Batches that are ready before they are asked for."""


class Blocks(Protocol):
    """Rows that are read a block at a time: ``Encoded``, or ``Streamed`` from Parquet."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each block, (K,) int64, known before any is read."""
        ...

    def block(self, number: int) -> Encoded:
        """The rows of one block."""
        ...


@final
class Batches:
    """Batches of tensors, ``{"ids", "numeric", "labels"}``, shuffled by block and buffer.

    Blocks come in random order, ``buffer`` of them at a time are held, and their rows are mixed
    among each other; ``shuffle=False`` gives the order of the log. Batches have ``batch_size``
    rows but for the last of the epoch, which ``drop_last`` leaves out. Of ``ranks`` processes each
    gets its own ``batch_size`` rows of every step, as the ranks' parts of one large batch; the
    last, shorter step is then dropped, so that all take equally many.

    ``set_epoch`` chooses the epoch; iterating gives its batches, the first time after
    ``load_state_dict`` from that position on. ``state_dict`` tells what the training loop has
    taken, not what was read ahead. Memory is that of two buffers.

    Raises RequestError for sizes that are not positive and for sources without rows.
    """

    def __init__(
        self,
        source: Blocks,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        buffer: int = 8,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
        ahead: bool = True,
    ) -> None:
        require_whole("batch_size", batch_size, 1)
        require_whole("buffer", buffer, 1)
        require_whole("seed", seed, 0)
        require_whole("ranks", ranks, 1)
        if not 0 <= rank < ranks:
            raise RequestError(f"rank must be from 0 to {ranks - 1}, got {rank}")
        self.source, self.batch_size, self.seed, self.shuffle = source, batch_size, seed, shuffle
        self.buffer, self.rank, self.ranks, self.ahead = buffer, rank, ranks, ahead
        self.drop_last = drop_last or ranks > 1
        self.total = int(source.sizes.sum())
        if not self.total:
            raise RequestError("there are no rows to make batches of")
        if not len(self):
            raise RequestError(
                f"{self.total} rows give no whole step of {ranks} x {batch_size}: take a smaller "
                "batch_size"
            )
        self.epoch = self.position = self._start = 0
        self.waited = 0.0
        """Seconds that iterating has waited for rows, since the start."""

    def __len__(self) -> int:
        step = self.batch_size * self.ranks
        return self.total // step if self.drop_last else -(-self.total // step)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless that is the one it is in the middle of."""
        require_whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been given out; what it must fit."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "rows": self.total,
            "batch_size": self.batch_size,
            "buffer": self.buffer,
            "ranks": self.ranks,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that position. Raises RequestError for a state of other data or batches."""
        held = self.state_dict()
        for name in ("seed", "rows", "batch_size", "buffer", "ranks"):
            if state[name] != held[name]:
                raise RequestError(
                    f"the saved position is of batches with {name} {state[name]}, these have "
                    f"{held[name]}; continue with what it was begun with, or start afresh"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._start = self.position

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.position, self._start = self._start, 0
        made = self._from(self.epoch, self.position)
        batches = _ahead(made) if self.ahead else made
        try:
            while True:
                begun = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - begun
                if batch is None:
                    break
                self.position += 1
                yield batch
        finally:
            batches.close()

    def groups(self, epoch: int) -> list[NDArray[np.int64]]:
        """Blocks of the epoch in their order, ``buffer`` of them together."""
        order = np.arange(len(self.source.sizes))
        if self.shuffle:
            order = self._generator(epoch, 0).permutation(order)
        order = order[self.source.sizes[order] > 0]
        return [order[i : i + self.buffer] for i in range(0, len(order), self.buffer)]

    def _generator(self, epoch: int, part: int) -> np.random.Generator:
        # a group's order depends on no other, so that groups can be passed over unread
        return np.random.default_rng([self.seed, epoch, part])

    def _from(self, epoch: int, position: int) -> Any:
        """Batches from ``position`` on, a generator."""
        step = self.batch_size * self.ranks
        offset = self.rank * self.batch_size
        wanted, last = position * step, len(self) * step
        if wanted >= min(last, self.total):
            return
        passed = 0
        held: list[tuple[Encoded, NDArray[np.int64]]] = []
        waiting = 0
        for number, group in enumerate(self.groups(epoch)):
            rows = int(self.source.sizes[group].sum())
            if passed + rows <= wanted:
                passed += rows
                continue
            whole, order = self._mixed(group, epoch, number, rows)
            begin = max(0, wanted - passed)
            passed += rows
            while begin < rows:
                taken = min(rows - begin, step - waiting)
                held.append((whole, order[begin : begin + taken]))
                waiting += taken
                begin += taken
                if waiting == step:
                    yield self._own(held, offset)
                    held, waiting = [], 0
                    if (wanted := wanted + step) >= last:
                        return
        if waiting and not self.drop_last:
            yield self._own(held, offset)

    def _own(self, held: list[tuple[Encoded, NDArray[np.int64]]], offset: int) -> dict[str, Tensor]:
        """This rank's rows of a step, whose rows are spread over ``held``."""
        if self.ranks == 1:
            return tensors(joined(held))
        own, begin = [], 0
        for rows, places in held:
            end = begin + len(places)
            low, high = max(begin, offset), min(end, offset + self.batch_size)
            if low < high:
                own.append((rows, places[low - begin : high - begin]))
            begin = end
        return tensors(joined(own))

    def _mixed(
        self, group: NDArray[np.int64], epoch: int, number: int, rows: int
    ) -> tuple[Encoded, NDArray[np.int64]]:
        """The rows of some blocks, and the order to take them in."""
        whole = joined([(self.source.block(int(k)), slice(None)) for k in group])
        if len(whole) != rows:
            raise RequestError(
                f"a block has {len(whole)} rows and had {rows} when it was counted: the files "
                "have changed; read them anew"
            )
        order = np.arange(rows)
        if self.shuffle:
            self._generator(epoch, 1 + number).shuffle(order)
        return whole, order


def _ahead(made: Any) -> Any:
    """The same, made in a thread of its own while they are used; a generator."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=_AHEAD)
    ended = threading.Event()

    def put(item: Any) -> bool:
        while not ended.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for batch in made:
                if not put((batch, None)):
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    worker = threading.Thread(target=work, name="sparing-batches", daemon=True)
    worker.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        ended.set()
        worker.join()
