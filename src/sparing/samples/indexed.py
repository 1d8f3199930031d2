"""Samples together with their ids, so that a sample's identity travels in its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch.utils.data import Dataset, IterableDataset

from sparing.core.errors import RequestError


@final
class Indexed(Dataset[Any]):
    """What ``indexed`` gives; pickles, copies and forks as the data set inside does."""

    def __init__(self, data: Any, key: str) -> None:
        self.data, self.key = data, key
        self.length = len(data)

    def __len__(self) -> int:
        """The length at the start; RequestError if the data set has changed it."""
        self._check()
        return self.length

    def __getitem__(self, index: int) -> Any:
        self._check()
        return self._with(index, self.data[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A batch at once, for data sets that can read one so."""
        self._check()
        several = getattr(self.data, "__getitems__", None)
        rows = several(indices) if callable(several) else [self.data[i] for i in indices]
        return [self._with(index, row) for index, row in zip(indices, rows, strict=True)]

    def _with(self, index: int, sample: Any) -> Any:
        index = int(index)
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise RequestError(
                    f'the samples have a field "{self.key}" already; name another for their ids: '
                    'indexed(data, key="sample_id")'
                )
            return {**sample, self.key: index}
        if isinstance(sample, tuple) and not hasattr(sample, "_fields"):
            return (index, *sample)
        if isinstance(sample, list):
            return [index, *sample]
        return index, sample

    def _check(self) -> None:
        if len(self.data) != self.length:
            raise RequestError(
                f"the data set had {self.length} samples and has {len(self.data)} now; the id of "
                "a sample must stay the same during training: make a new sampler for the new data"
            )


def indexed(data: Any, key: str = "index") -> Indexed:
    """The data set with each sample's id added: ``(x, y)`` becomes ``(index, x, y)``.

    A mapping gets the field ``key``, a list the id in front; anything else ``s`` becomes
    ``(index, s)``. Collate functions see it as a part of the sample: torch's own makes an int64
    tensor of it. ``data`` is any map-style data set: of torch, Subset, ConcatDataset, of Hugging
    Face, a list. Raises RequestError for iterable data sets, whose samples have no ids.
    """
    if isinstance(data, Indexed):
        raise RequestError("this data set is indexed already")
    iterable = isinstance(data, IterableDataset) or not hasattr(data, "__getitem__")
    if iterable or not hasattr(data, "__len__"):
        raise RequestError(
            f"{type(data).__name__} is iterable: its samples have no ids and no fixed number, so "
            "their losses cannot be told apart in the next epoch. Load it as a map-style data set "
            "(with __getitem__ and __len__; for Hugging Face, streaming=False), or choose within "
            "the stream: skip samples by a rule of their own before they are batched"
        )
    return Indexed(data, key)
