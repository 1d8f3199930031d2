"""WebDataset tars: members that share the name up to its first dot are one sample."""

from __future__ import annotations

import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Final, NamedTuple, final

from sparing.pool.items import Drop, Item
from sparing.pool.sources.reading import Reading
from sparing.pool.sources.samples import Member, Sample
from sparing.pool.sources.source import DONE, Read, Source
from sparing.pool.sources.stamp import Listed

_BLOCK: Final = 512
_MEMBERS: Final = 16  # at most so many make a sample
_LOOKED_AT: Final = 32  # first samples by which it is judged what each must have
_DAMAGED: Final = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


class _Held(NamedTuple):
    """A sample as it stands in the file, and what follows: a place, or why none follows."""

    sample: Sample | None
    behind: int
    cut: str = ""


class _First(NamedTuple):
    """Of a file's first samples: image or text, as each must have; suffixes that all have."""

    wanted: frozenset[str]
    suffixes: frozenset[str]


@final
class Tars(Source):
    """Each sample is an item; its key is "file:name". Nothing is ever unpacked to the disk."""

    kind: ClassVar[str] = "tar"

    def __init__(
        self, path: Path, files: Sequence[Listed], *, name: str | None, reading: Reading
    ) -> None:
        """``files`` may be compressed; they need not end with a tar's mark of its end."""
        super().__init__(path, files, name=name, reading=reading)
        self._found: dict[str, _First] = {}

    def _read(self, file: Listed, at: Any) -> Iterator[Read]:
        if at == DONE:
            return
        first = self._first(file)
        for held in _samples(self.root / file.name, file.name, at or 0, self.reading):
            told: list[Item | Drop] = []
            if held.sample is not None:
                # a cut may have taken members of the last sample, a label say
                held.sample.cut = bool(held.cut) and not first.suffixes <= held.sample.suffixes()
                told.append(held.sample.outcome(first.wanted, self.reading))
            if held.cut:
                detail = f"{file.name}: {held.cut}; what stands before is taken"
                told.append(Drop(key=file.name, reason="unreadable", detail=detail))
            yield Read(told, DONE if held.cut else held.behind, min(held.behind, file.size))

    def _first(self, file: Listed) -> _First:
        """What the file's first samples hold; with the option, what each must have."""
        if file.name not in self._found:
            parts: set[str] = set()
            suffixes: list[frozenset[str]] = []
            samples = _samples(self.root / file.name, file.name, 0, self.reading)
            for _, held in zip(range(_LOOKED_AT), samples, strict=False):
                if held.sample is not None:
                    parts |= held.sample.parts(self.reading)
                    suffixes += [] if held.cut else [held.sample.suffixes()]
            if self.reading.content != "auto":
                parts = set(self.reading.content.split("-"))
            common = frozenset.intersection(*suffixes) if suffixes else frozenset[str]()
            self._found[file.name] = _First(frozenset(parts), common)
        return self._found[file.name]


def _samples(path: Path, name: str, at: int, reading: Reading) -> Iterator[_Held]:
    """The samples from the byte ``at`` on, where a member's header stands."""
    waiting: Sample | None = None
    with open(path, "rb") as raw, _opened(raw, path) as file:
        for member, place, cut in _members(file, at, reading):
            if member is None:
                yield _Held(waiting, place, cut)
                return
            stem = _stem(member.name)
            if waiting is not None and waiting.stem != stem:
                yield _Held(waiting, place)
                waiting = None
            if waiting is None:
                waiting = Sample(stem=stem, key=f"{name}:{stem}")
            if len(waiting.members) < _MEMBERS:
                waiting.members.append(member)
            else:  # never so many in memory
                wrong = f"is one of more than {_MEMBERS} of one name"
                waiting.members = [
                    Member(name=member.name, data=b"", wrong=wrong, suffix="")
                ] * _MEMBERS


def _members(
    file: IO[bytes], at: int, reading: Reading
) -> Iterator[tuple[Member | None, int, str]]:
    """(member, where its header stands, ""), at last (None, where the end is, what is wrong)."""
    place = at
    try:
        while True:  # tars put behind one another are read as one
            file.seek(place)
            if not file.read(1):
                # a writer that leaves out the mark of the end, or a cut between two members
                cut = "" if place == 0 else "ends without a tar's mark of its end: it may be cut"
                yield None, place, cut or "is empty"
                return
            begun = _behind_zeros(file, place)
            if begun is None:
                yield None, place, ""
                return
            place = begun
            file.seek(place)
            tar = tarfile.TarFile(fileobj=file, mode="r", errorlevel=2)
            held: list[tarfile.TarInfo] = vars(tar)["members"]  # it would keep them all
            while (info := tar.next()) is not None:
                place = info.offset
                del held[:]
                member = _member(tar, info, reading)
                if member is not None:
                    yield member, place, ""
                place = tar.offset
            place = tar.offset
            file.seek(place)
            mark = file.read(_BLOCK)
            if mark and mark.strip(b"\0"):
                if len(mark) < _BLOCK:
                    raise tarfile.ReadError("a header is cut short")
                raise tarfile.ReadError("a header is damaged")
    except _DAMAGED as error:
        yield None, place, f"cut short or damaged at byte {place:,} ({error})"


def _behind_zeros(file: IO[bytes], place: int) -> int | None:
    """Where the first block stands that is not of zeros, from ``place`` on; None if none does."""
    file.seek(place)
    while block := file.read(_BLOCK):
        if block.strip(b"\0"):
            return place
        place += len(block)
    return None


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, reading: Reading) -> Member | None:
    """The member with its bytes, or with why it has none; None for folders and hidden files."""
    name, wrong = info.name, ""
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        wrong = "points outside the tar"
    elif info.issym() or info.islnk():
        kind = "symbolic" if info.issym() else "hard"
        wrong = f"is a {kind} link to {info.linkname!r}; members must hold their bytes"
    elif info.isdir() or name.rpartition("/")[2].startswith("."):
        return None
    elif not info.isreg():
        wrong = "is no file (a device or pipe)"
    elif info.size > reading.bytes:
        wrong = f"has {info.size:,} bytes; at most {reading.bytes:,} are taken"
    if wrong:
        return Member(name=name, data=b"", wrong=wrong, suffix=suffix)
    held = tar.extractfile(info)
    data = b"" if held is None else held.read()
    if len(data) < info.size:
        raise tarfile.ReadError(f"{name} has {len(data):,} of {info.size:,} bytes")
    return Member(name=name, data=data, wrong="", suffix=suffix)


def _stem(name: str) -> str:
    """The name up to the first dot behind the last slash."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".")[0]


def _opened(raw: IO[bytes], path: Path) -> Any:
    if path.suffix in (".gz", ".tgz"):
        return gzip.open(raw, "rb")
    if path.suffix in (".xz", ".txz"):
        return lzma.open(raw, "rb")
    return raw
