"""Looking for damage: every committed byte, and each row of the catalogue, is read and compared
with its checksum.
"""

from __future__ import annotations

import contextlib
import zlib
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RunError
from sparing.pool.store import lock, records, segments
from sparing.pool.store.catalogue import FILE, Catalogue, Damaged, Part, State
from sparing.pool.store.files import Files, Gone
from sparing.pool.store.recovery import orphans

_BLOCK: Final = 1 << 24
_SHOWN: Final = 20
_TRIES: Final = 20


def check(path: str | Path) -> list[str]:
    """What is wrong with the store at ``path``, a sentence each; nothing is changed.

    It may run while a writer does. Bytes behind the committed length are no damage: the next
    writer cuts them. Raises RunError if there is no store, or one of a newer version.
    """
    folder = Path(path)
    if not (folder / FILE).is_file():
        raise RunError(f"there is no store at {folder}; check the path, or create one")
    catalogue = Catalogue(folder)
    with contextlib.suppress(Damaged):
        catalogue.read()  # raises for another version, whose tables may be others
    try:
        found = catalogue.problems()
        rows = [] if found else catalogue.damaged_rows()
    except RunError as error:
        return [str(error)]
    if found:
        return found
    for _ in range(_TRIES):
        try:
            state = catalogue.read()
        except Damaged as error:
            return rows or [str(error)]
        try:
            return rows + _Check(folder, state, catalogue).problems()
        except Gone as error:
            gone = error
        except Exception:
            if not rows:
                raise
            return rows  # what they say cannot be followed
    return [f"{gone} is missing though the catalogue lists it"]


@final
class _Check:
    """One pass over a store as of one state."""

    def __init__(self, folder: Path, state: State, catalogue: Catalogue) -> None:
        self.folder, self.state, self.catalogue = folder, state, catalogue
        self.files = Files(folder)
        self.found: list[str] = []

    def problems(self) -> list[str]:
        sound = {part.number for part in self.state.parts.values() if self._bytes(part)}
        self._items(sound)
        self._changes(sound)
        self._snapshots()
        self._orphans()
        return self.found

    def _orphans(self) -> None:
        """Files that nothing lists. What a writer is about to commit is none."""
        paths = orphans(self.folder, self.state)
        if not paths or lock.held(self.folder):
            return
        # nobody writes now, but somebody may have committed them since the state was read
        listed = {part.file for part in self.catalogue.read().parts.values()}
        for path in paths:
            name = path.relative_to(self.folder).as_posix()
            if name not in listed and path.exists():
                self.found.append(f"{name} is not in the catalogue; the next writer removes it")

    def _bytes(self, part: Part) -> bool:
        """Whether a part is all there and as it was written."""
        path = self.folder / part.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            if part.number in self.catalogue.read().parts:
                self.found.append(f"{part.file} is missing though the catalogue lists it")
                return False
            raise Gone(part.file) from None
        if size < part.bytes:
            self.found.append(f"{part.file} is cut short: {size} of {part.bytes} bytes are left")
            return False
        crc, data = 0, self.files.bytes_of(part)
        for begin in range(0, part.bytes, _BLOCK):
            crc = zlib.crc32(data[begin : begin + _BLOCK], crc)
        if crc != part.crc:
            self.found.append(f"{part.file} does not match its checksum")
            return False
        return True

    def _items(self, sound: set[int]) -> None:
        rows = self.state.of("rows")
        total = sum(part.rows for part in rows)
        kinds = ["main", "second"] if self.state.settings["second"] else ["main"]
        for kind, name in [("payload", ""), *(("vectors", which) for which in kinds)]:
            count = sum(part.rows for part in self.state.of(kind, name))
            if count != total:
                what = f"{name} {kind}".strip()
                self.found.append(f"the catalogue lists {total} items and {what} of {count}")
        if any(part.number not in sound for part in rows):
            self._damaged_items(sound, None)
            return
        tables = [self.files.table(part, ["id", "bytes", "source"]) for part in rows]
        for part, table in zip(rows, tables, strict=True):
            if table.num_rows != part.rows:
                self.found.append(f"{part.file} holds {table.num_rows} of {part.rows} items")
        if not tables:
            return
        joined = segments.concatenate(tables)
        ids = segments.values_of(joined, "id", "int64")
        if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= self.state.next_id:
            self.found.append("ids are not ascending and below the next one")
        sizes = segments.values_of(joined, "bytes", "int64")
        payload = self.state.of("payload")
        if sizes.sum() != sum(part.bytes for part in payload):
            self.found.append("the items' lengths do not add up to the payload's")
        numbers = [number for number, _ in self.state.sources.values()]
        if not np.isin(segments.values_of(joined, "source", "int32"), numbers).all():
            self.found.append("items are of a source that the catalogue does not list")
        self.ids = ids
        self._damaged_items(sound, sizes)

    def _damaged_items(self, sound: set[int], sizes: NDArray[Any] | None) -> None:
        """Name the items of damaged shards that can no longer be read."""
        start = 0
        for part in self.state.of("payload"):
            end = start + part.rows
            present = (self.folder / part.file).exists()
            if part.number not in sound and present and sizes is not None:
                data = (self.folder / part.file).read_bytes()
                bad = []
                begin = 0
                for number, size in zip(
                    self.ids[start:end].tolist(), sizes[start:end].tolist(), strict=True
                ):
                    try:
                        records.decode(data[begin : begin + size], number)
                    except RunError:
                        bad.append(number)
                    begin += size
                more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
                names = ", ".join(map(str, bad[:_SHOWN]))
                self.found.append(f"{part.file}: damaged items {names}{more}")
            start = end

    def _changes(self, sound: set[int]) -> None:
        for part in self.state.parts.values():
            if part.kind not in ("column", "score") or part.number not in sound:
                continue
            table = self.files.table(part, ["id", "change"])
            if table.num_rows != part.rows:
                self.found.append(f"{part.file} holds {table.num_rows} of {part.rows} values")
            if (
                table.num_rows
                and segments.values_of(table, "change", "int64").max() > self.state.change
            ):
                self.found.append(f"{part.file} holds changes that were never made")
            if part.kind == "column" and part.name not in {*self.state.columns, *segments.BUILT_IN}:
                self.found.append(f"{part.file} is of a column that the catalogue does not list")

    def _snapshots(self) -> None:
        snapshots = self.catalogue.snapshots()
        # read behind them: a writer may have made one since the check began
        next_id = self.catalogue.read().next_id
        for snapshot in snapshots:
            if snapshot.next_id > next_id:
                self.found.append(f"snapshot {snapshot.number} is of items that do not exist")
        waiting = self._forgetting()
        # beside a writer they may be on their way out, or have gone since
        if waiting and not lock.held(self.folder) and (waiting := waiting & self._forgetting()):
            self.found.append(
                f"{len(waiting)} items are still to be forgotten; open the store for writing to "
                f"finish"
            )

    def _forgetting(self) -> set[int]:
        with self.catalogue.transaction("read") as connection:
            query = self.catalogue.tables["forgetting"].select()
            return set(connection.execute(query).scalars().all())
