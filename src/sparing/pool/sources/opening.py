"""A source by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from sparing.core.checks import require_known
from sparing.core.errors import RequestError, unknown
from sparing.pool.sources.folder import Folder
from sparing.pool.sources.jsonl import Lines
from sparing.pool.sources.parquet import Rows
from sparing.pool.sources.reading import Reading
from sparing.pool.sources.source import Source
from sparing.pool.sources.stamp import Listed, listed
from sparing.pool.sources.tars import Tars

_SUFFIXES: Final[dict[str, tuple[str, ...]]] = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.xz", ".ndjson", ".ndjson.gz", ".ndjson.xz"),
    "parquet": (".parquet", ".pq"),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz"),
}
_CLASSES: Final[dict[str, Any]] = {"jsonl": Lines, "parquet": Rows, "tar": Tars}
KINDS_OF_SOURCES: Final = ("folder", *_SUFFIXES)


def open_source(
    path: str | Path, *, kind: str = "auto", name: str | None = None, **options: Any
) -> Source:
    """The source at ``path``: a folder of images, a file, or a folder of files of one kind.

    kind: one of KINDS_OF_SOURCES; "auto" goes by the names of files. name: what the store calls
    the source, its whole path by default. ``options``: those of Reading. Raises RequestError for
    a path that is not there or holds nothing, an unknown option, and columns that are missing.
    """
    path = Path(path)
    require_known("a source", options, Reading)
    reading = Reading(**options)
    if kind not in ("auto", *KINDS_OF_SOURCES):
        raise unknown("kind of source", kind, ("auto", *KINDS_OF_SOURCES))
    if not path.exists():
        raise RequestError(f"there is no source at {path}; check the path")
    try:
        if path.is_dir():
            return _folder(path, kind, name, reading)
        found = _kind(path.name) if kind == "auto" else kind
        if found is None or found == "folder":
            endings = ", ".join(ending for known in _SUFFIXES.values() for ending in known)
            raise RequestError(
                f"{path} is no source by its name; known are folders of images and {endings}. "
                f"Name its kind where it has another ending: {', '.join(_SUFFIXES)}"
            )
        if not path.is_file():
            raise RequestError(f"{path} is no file: sources are read again after a restart")
        made: Source = _CLASSES[found](path, [listed(path, path.name)], name=name, reading=reading)
        return made
    except OSError as error:
        raise RequestError(f"the source {path} cannot be read ({error})") from error


def _folder(path: Path, kind: str, name: str | None, reading: Reading) -> Source:
    held: dict[str, list[Listed]] = {}
    for entry in path.iterdir():
        found = _kind(entry.name)
        if found is not None and not entry.name.startswith(".") and entry.is_file():
            held.setdefault(found, []).append(listed(entry, entry.name))
    if kind == "auto":
        if len(held) > 1:
            there = ", ".join(f"{len(files)} {known}" for known, files in sorted(held.items()))
            raise RequestError(f"{path} holds files of several kinds ({there}); name one of them")
        kind = next(iter(held), "folder")
    if kind == "folder":
        return Folder(path, name=name, reading=reading)
    if kind not in held:
        raise RequestError(f"{path} holds no files of {', '.join(_SUFFIXES[kind])}")
    made: Source = _CLASSES[kind](path, sorted(held[kind]), name=name, reading=reading)
    return made


def _kind(name: str) -> str | None:
    lowered = name.lower()
    for kind, endings in _SUFFIXES.items():
        if lowered.endswith(endings):
            return kind
    return None
