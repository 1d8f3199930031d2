"""A folder of images, with its sub-folders; their names are classes by option."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, final

from sparing.core.errors import RequestError
from sparing.pool.items import UNLABELLED, Drop, Item
from sparing.pool.sources.content import IMAGES, file_inside, image
from sparing.pool.sources.reading import Reading, Unreadable
from sparing.pool.sources.source import DONE, Read, Source
from sparing.pool.sources.stamp import Listed


@final
class Folder(Source):
    """Each image file is an item; its key is its path in the folder."""

    kind: ClassVar[str] = "folder"

    def __init__(self, path: Path, *, name: str | None, reading: Reading) -> None:
        """Raises RequestError if there is no image in it, or classes are wanted and not there."""
        if reading.content in ("text", "image-text"):
            raise RequestError(
                f"{path}: a folder holds images alone; for captions give a JSONL file with columns "
                '"file_name" and "text" beside the images, Parquet or a tar'
            )
        super().__init__(path, images_below(path), name=name, reading=reading)
        if not self.files:
            raise RequestError(
                f"{path} holds no images ({', '.join(IMAGES)}) and no .jsonl, .parquet or .tar "
                "files; check the path"
            )
        self.classes = reading.classes
        if reading.labels:
            top = {file.name.split("/")[0] for file in self.files if "/" in file.name}
            self.classes = self.classes or tuple(sorted(top))
            if not top:
                raise RequestError(
                    f"{path} has no sub-folders with images, whose names would be the labels"
                )

    def _state(self) -> dict[str, Any]:
        if not self.reading.labels:
            return {}
        joined = "\0".join(self.classes).encode("utf-8", "surrogateescape")
        told = hashlib.blake2b(joined, digest_size=8).hexdigest()
        return {"classes": f"{len(self.classes)} classes ({told})"}

    def _read(self, file: Listed, at: Any) -> Iterator[Read]:
        if at == DONE:
            return
        outcome: Item | Drop
        key = file.name.encode("utf-8", "backslashreplace").decode()
        try:
            data = image(file_inside(self.path, file.name, self.reading), self.reading)
            outcome = Item(key=key, image=data, label=self._label(file.name))
        except Unreadable as error:
            outcome = Drop(key=key, reason="unreadable", detail=f"{key}: {error}")
        yield Read((outcome,), DONE, file.size)

    def _label(self, name: str) -> int:
        if not self.reading.labels:
            return UNLABELLED
        first, slash, _ = name.partition("/")
        if not slash:
            raise Unreadable("it lies in no sub-folder, whose name would be its label")
        if first not in self.classes:
            raise Unreadable(f'its sub-folder "{first}" is none of the classes')
        return self.classes.index(first)


def images_below(path: Path) -> list[Listed]:
    """The image files in a folder and its sub-folders, by name; hidden ones are left out.

    Links to folders are not followed: they may lead outside, or round in a circle.
    """
    found: list[Listed] = []
    folders = [""]
    while folders:
        below = folders.pop()
        with os.scandir(path / below) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name + "/")
                elif os.path.splitext(entry.name)[1].lower() in IMAGES and not _leads_to_folder(
                    entry
                ):
                    about = entry.stat(follow_symlinks=False)
                    found.append(Listed(name, about.st_size, about.st_mtime_ns))
    return sorted(found)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself, which is told of when it is read
        return False
