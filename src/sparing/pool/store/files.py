"""Reading a store's files: opened once, mapped into memory, checked against the catalogue."""

from __future__ import annotations

import mmap
import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RunError
from sparing.pool.store import segments
from sparing.pool.store.catalogue import Part

_OPEN: Final = 128


class Gone(Exception):
    """A file was taken away by a merge, a compaction or forgetting; read the catalogue anew."""


@final
class Files:
    """Read access to parts. Nothing is open after a pickle; a fork may go on with what is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: OrderedDict[int, tuple[int, mmap.mmap]] = OrderedDict()
        self._checked: set[int] = set()

    def bytes_of(self, part: Part) -> memoryview:
        """The committed bytes of a part, mapped. Raises Gone, or RunError if it is cut short."""
        if not part.bytes:
            return memoryview(b"")
        held = self._maps.get(part.number)
        if held is None or held[0] < part.bytes:
            held = (part.bytes, self._map(part))
            self._maps[part.number] = held
            if len(self._maps) > _OPEN:
                self._maps.popitem(last=False)
        self._maps.move_to_end(part.number)
        return memoryview(held[1])[: part.bytes]

    def _map(self, part: Part) -> mmap.mmap:
        path = self.folder / part.file
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise Gone(part.file) from error
        try:
            size = os.fstat(handle).st_size
            if size < part.bytes:
                raise RunError(
                    f"{path} is damaged: {size} of {part.bytes} bytes are left; put back a copy"
                )
            return mmap.mmap(handle, part.bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)

    def table(self, part: Part, names: list[str] | None = None) -> Any:
        """A segment's table; its checksum is looked at once. Raises as ``bytes_of``."""
        data = self.bytes_of(part)
        if part.number not in self._checked:
            if zlib.crc32(data) != part.crc:
                raise RunError(
                    f"{self.folder / part.file} does not match its checksum; put back a copy"
                )
            self._checked.add(part.number)
        return segments.decode(data, names)

    def matrix(self, part: Part, dtype: str, dim: int) -> NDArray[Any]:
        """Vectors of a part, mapped and not to be written: (rows, dim)."""
        return np.frombuffer(self.bytes_of(part), dtype).reshape(part.rows, dim)

    def forget(self) -> None:
        """Close what is open (as far as nobody reads it still)."""
        self._maps.clear()
        self._checked.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, (self.folder,)
