"""One score for each sample: its latest losses, kept by id.

Updates are noted on the device where the losses are, and written into the table some steps later,
all at once: no step waits for the device. Ranks exchange what they saw at the end of an epoch only.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core import ranks
from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown

MODES = {
    "last": "the newest loss",
    "ema": "an exponential moving average",
    "window": "the mean of the newest few",
    "forgetting": "of 1 for right and 0 for wrong: how often wrong after right",
    "variance": "a moving average of the loss, and one of its squared deviation",
}
FLUSH_EVERY = 64
"""Updates that are noted before they are written into the table."""


@final
class ScoreTable:
    """Float32 scores of ``size`` samples, by int64 id; NaN where a sample was never seen.

    ``mode``: "last"; "ema" (``momentum`` times the old value plus the rest of the new);
    "window" (the mean of the newest ``window``); "variance" (as "ema", and beside it
    ``v <- momentum * (v + (1 - momentum) * (x - mean)^2)``, West 1979); "forgetting" (Toneva et
    al. 2019, arXiv 1812.05159). A loss that is not
    finite is rejected and counted, and the sample keeps its score. ``repeats``: whether a sample
    may come more than once in a batch; else that is an error.
    """

    def __init__(
        self,
        size: int,
        mode: str = "last",
        *,
        momentum: float = 0.8,
        window: int = 5,
        repeats: bool = False,
    ) -> None:
        require_whole("size", size, 1)
        if mode not in MODES:
            raise unknown("mode of scores", mode, MODES)
        require_number("momentum", momentum, 0, 1)
        require_whole("window", window, 1)
        self.size, self.mode, self.momentum, self.window = size, mode, momentum, window
        self.repeats = repeats
        self.rejected = 0
        self._rejected_here = 0  # since the last merge, on this rank
        self._columns = {"value": np.full(size, np.nan, dtype=np.float32)}
        if mode == "variance":
            self._columns["variance"] = np.zeros(size, dtype=np.float32)
        if mode == "forgetting":
            self._columns["was"] = np.zeros(size, dtype=np.float32)
            self._columns["ever"] = np.zeros(size, dtype=np.float32)
        if mode == "window":
            self._columns["ring"] = np.full((size, window), np.nan, dtype=np.float32)
            self._columns["next"] = np.zeros(size, dtype=np.uint16)
        self._touched: NDArray[np.bool_] | None = None
        self._noted: list[tuple[Tensor, Tensor, float | None]] = []

    # ---- writing -----------------------------------------------------------------------------

    def update_(self, ids: Tensor, losses: Tensor, *, momentum: float | None = None) -> None:
        """Note the losses (B,), any float dtype, of the samples ``ids``, (B,) int64.

        With ``momentum`` given, they enter as a moving average of that momentum, whatever the
        mode. Raises RequestError for other shapes or types at once; for ids that are out of range
        or repeated at once on the CPU, and when they are written on another device, since
        looking at them would wait for it.
        """
        if ids.ndim != 1 or losses.shape != ids.shape:
            raise RequestError(
                f"every loss needs the id of its sample: got losses of shape {tuple(losses.shape)} "
                f"and ids of shape {tuple(ids.shape)}"
            )
        if ids.dtype is not torch.int64:
            raise RequestError(f"ids must be int64, got {ids.dtype}; other types lose large ids")
        if ids.device.type == "cpu":
            check_ids(ids.numpy(), self.size, self.repeats)
        # copies: the loop may write into its tensors, and loaders may reuse theirs
        kept = losses.detach().to(torch.float32, copy=True)
        self._noted.append((ids.clone(), kept, momentum))
        if len(self._noted) >= FLUSH_EVERY:
            self.flush_()

    def flush_(self) -> None:
        """Write what was noted into the table; waits for the device once. Errors as ``update_``."""
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        ids = [n.numpy() for n in _to_cpu([ids for ids, _, _ in noted])]
        losses = [n.numpy() for n in _to_cpu([losses for _, losses, _ in noted])]
        for (there, _, _), here in zip(noted, ids, strict=True):
            if there.device.type != "cpu":
                check_ids(here, self.size, self.repeats)
        momenta = [momentum for _, _, momentum in noted]
        if all(momentum == momenta[0] for momentum in momenta):
            self._write(np.concatenate(ids), np.concatenate(losses), momenta[0])
        else:
            for each, values, momentum in zip(ids, losses, momenta, strict=True):
                self._write(each, values, momentum)

    def _write(
        self, ids: NDArray[np.int64], losses: NDArray[np.float32], momentum: float | None
    ) -> None:
        good = np.isfinite(losses)
        bad = losses.size - int(np.count_nonzero(good))
        if bad:
            self.rejected += bad
            self._rejected_here += bad
            ids, losses = ids[good], losses[good]
        if self._touched is None and ranks.distributed():
            self._touched = np.zeros(self.size, dtype=bool)
        if self._touched is not None:
            self._touched[ids] = True
        if momentum is None and self.mode == "last":
            self._columns["value"][ids] = losses  # of repeated ids the last one stays
            return
        for turn in _turns(ids):
            self._blend(ids[turn], losses[turn], momentum)

    def _blend(
        self, ids: NDArray[np.int64], losses: NDArray[np.float32], momentum: float | None
    ) -> None:
        """Update rows that are all different."""
        value = self._columns["value"]
        if momentum is None and self.mode == "window":
            ring, following = self._columns["ring"], self._columns["next"]
            ring[ids, following[ids]] = losses
            following[ids] = (following[ids] + 1) % self.window
            rows = ring[ids].astype(np.float64)
            filled = ~np.isnan(rows)
            value[ids] = np.where(filled, rows, 0.0).sum(1) / filled.sum(1)
            return
        if momentum is None and self.mode == "forgetting":
            was, ever = self._columns["was"], self._columns["ever"]
            value[ids] = np.nan_to_num(value[ids]) + ((was[ids] > 0) & (losses == 0))
            was[ids] = losses
            ever[ids] = np.maximum(ever[ids], losses)
            return
        keep = self.momentum if momentum is None else momentum
        old = value[ids].astype(np.float64)
        first = np.isnan(old)
        away = np.where(first, 0.0, losses - old)
        if self.mode == "variance":
            spread = self._columns["variance"]
            spread[ids] = keep * (spread[ids] + (1 - keep) * away * away)
        value[ids] = np.where(first, losses, old + (1 - keep) * away)

    def forget_(self) -> None:
        """As if no sample had been seen."""
        self.load_state_dict(ScoreTable(self.size, self.mode, window=self.window).state_dict())

    # ---- reading -----------------------------------------------------------------------------

    @property
    def value(self) -> NDArray[np.float32]:
        """The scores, (N,), NaN where never seen; what is noted is written first."""
        self.flush_()
        return self._columns["value"]

    def column(self, name: str) -> NDArray[Any]:
        """A column beside the scores, (N,): "was" and "ever" (right) of mode "forgetting"."""
        self.flush_()
        return self._columns[name]

    @property
    def variance(self) -> NDArray[np.float32]:
        """The moving variance, (N,), of mode "variance"."""
        self.flush_()
        return self._columns["variance"]

    def mean(self) -> float:
        """The mean of the scores of the samples seen, in double precision; NaN if none was."""
        return mean_of(self.value)

    # ---- ranks and state ---------------------------------------------------------------------

    def merge_(self) -> None:
        """Give every rank what each of them saw since the last merge; all ranks must call it.

        Rows travel by id and are written in the order of the ranks, so that all hold the same
        bits, also where two saw the same sample. In one process only writes what is noted.
        """
        self.flush_()
        if not ranks.distributed():
            return
        touched = self._touched
        ids = np.zeros(0, np.int64) if touched is None else np.flatnonzero(touched)
        rows = [torch.from_numpy(np.ascontiguousarray(c[ids])) for c in self._columns.values()]
        counted = torch.tensor([self._rejected_here], dtype=torch.int64)
        for number, (theirs, count, *columns) in enumerate(
            ranks.gather_rows([torch.from_numpy(ids), counted, *rows])
        ):
            for column, row in zip(self._columns.values(), columns, strict=True):
                column[theirs.numpy()] = row.numpy()
            if number != ranks.rank():
                self.rejected += int(count)
        self._rejected_here = 0
        self._touched = np.zeros(self.size, dtype=bool)

    def state_dict(self) -> dict[str, Any]:
        """Everything; on several ranks, what others saw since the last merge is theirs."""
        self.flush_()
        touched = self._touched
        return {
            "size": self.size,
            "mode": self.mode,
            "columns": {k: torch.from_numpy(v.copy()) for k, v in self._columns.items()},
            "rejected": [self.rejected, self._rejected_here],
            "touched": None if touched is None else torch.from_numpy(touched.copy()),
            "rank": ranks.rank(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RequestError for the scores of another data set or mode."""
        for key in ("size", "mode"):
            if state[key] != getattr(self, key):
                raise RequestError(
                    f"the saved scores have {key} {state[key]!r}, this table {getattr(self, key)!r}"
                    "; load them where the data set and the options are the same"
                )
        self._noted = []
        self._columns = {k: v.numpy().copy() for k, v in state["columns"].items()}
        self.rejected, self._rejected_here = state["rejected"]
        # what another rank has seen is its own to tell
        own = state["touched"] is not None and state["rank"] == ranks.rank()
        self._touched = state["touched"].numpy().copy() if own else None
        if state["rank"] != ranks.rank():
            self._rejected_here = 0


def mean_of(values: NDArray[np.float32]) -> float:
    """The mean in double precision of what is not NaN; NaN if nothing is."""
    total = float(values.sum(dtype=np.float64))
    if np.isfinite(total) and values.size:
        return total / values.size
    seen = values[~np.isnan(values)]
    return float(seen.mean(dtype=np.float64)) if seen.size else float("nan")


def check_ids(ids: NDArray[np.int64], size: int, repeats: bool) -> None:
    """Raise RequestError for ids outside 0 to size - 1, or repeated unless they may be."""
    if not ids.size:
        return
    if int(ids.view(np.uint64).max()) >= size:  # negative ones are very large
        bad = ids[(ids < 0) | (ids >= size)]
        raise RequestError(
            f"{bad.size} of {ids.size} ids are outside 0 to {size - 1}, such as {int(bad[0])}; "
            "give the ids that came with the batch, and the size of the whole data set"
        )
    if repeats or ids.size < 2:
        return
    ordered = np.sort(ids)
    same = ordered[1:] == ordered[:-1]
    if same.any():
        raise RequestError(
            f"the id {int(ordered[1:][same][0])} comes more than once in a batch; a plan holds "
            "each sample once: give the ids that came with the batch"
        )


def _to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """All on the CPU, by one copy where they are on one other device."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return tensors
    sizes = [tensor.numel() for tensor in tensors]
    if len({tensor.device for tensor in tensors}) > 1:
        return [tensor.cpu() for tensor in tensors]
    return list(torch.split_with_sizes(torch.cat(tensors).cpu(), sizes))


def _turns(ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places of each id's first coming, then of its second, and so on."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    new = np.ones(ids.size, dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    if new.all():
        return [np.arange(ids.size)]
    start = np.maximum.accumulate(np.where(new, np.arange(ids.size), 0))
    coming = np.arange(ids.size) - start
    return [order[coming == turn] for turn in range(int(coming.max()) + 1)]
