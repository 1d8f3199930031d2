"""Several data sets as one, each a source with a name: map-style data sets, lists, text files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from sparing.core.errors import RequestError
from sparing.core.lines import kind, numbered, numbered_json


def lines(path: str | Path) -> list[Any]:
    """The samples of a text file: a line each, empty ones left out.

    ``.jsonl`` and ``.json`` lines are read as JSON, those of other files stay text; both may be
    compressed (``.xz``, ``.gz``). Raises RequestError, with file and line, for a file that is not
    there, is empty or cannot be read, and for a line that is not JSON.
    """
    path = Path(path)
    rows = numbered_json(path) if kind(path) in (".jsonl", ".json") else numbered(path)
    found = [row for _, row in rows]
    if not found:
        raise RequestError(f"{path} is empty: there is nothing to draw; leave the source out")
    return found


@final
class Sources(Dataset[Any]):
    """Named sources as one map-style data set; ``sparing.Mix`` draws from it by weights.

    sources: by name, map-style data sets (torch, Hugging Face, lists), or paths of text files
    (see ``lines``). Sample i of the whole is sample ``i - first`` of its source.
    Raises RequestError for no sources, an empty one, and for one that is iterable only.
    """

    def __init__(self, sources: Mapping[str, Any]) -> None:
        if not sources:
            raise RequestError("there are no sources to mix; give Sources({name: data set})")
        self.domains = tuple(map(str, sources))
        self.parts = [_opened(name, given) for name, given in sources.items()]
        sizes = [len(part) for part in self.parts]
        for name, size in zip(self.domains, sizes, strict=True):
            if size == 0:
                raise RequestError(f'the source "{name}" is empty; leave it out')
        self._ends: NDArray[np.int64] = np.cumsum(np.array(sizes, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        """The sample ``index``, as its source gives it; IndexError past the end."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[part - 1]) if part else 0
        return self.parts[part][index - before]

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, positions in ``domains``."""
        return torch.from_numpy(np.searchsorted(self._ends, index.cpu().numpy(), side="right"))


def _opened(name: str, given: Any) -> Any:
    if isinstance(given, str | Path):
        return lines(given)
    if isinstance(given, IterableDataset) or not (
        hasattr(given, "__getitem__") and hasattr(given, "__len__")
    ):
        raise RequestError(
            f'the source "{name}" is a {type(given).__name__}, whose samples have no number; give '
            "a map-style data set (with __getitem__ and __len__; for Hugging Face, "
            "streaming=False), a list, or the path of a text file"
        )
    return given
