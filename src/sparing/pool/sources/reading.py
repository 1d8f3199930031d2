"""How a source is read, and what makes an item unreadable."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final, final

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown

CONTENTS: Final = ("auto", "image", "text", "image-text")


class Unreadable(Exception):
    """An item that cannot be taken; its text is the drop's detail. Never leaves this package."""


@final
@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options of all sources; those that a kind of source has no use for change nothing in it.

    content: what every item must have, "image", "text" or "image-text"; "auto" goes by the columns
    of rows and by the first samples of a tar. labels: images of a folder get the number of their
    sub-folder, in the order of ``classes`` or of the sorted names. classes: names of classes, for
    labels that are words. image, text, label, key: names of columns of JSONL and Parquet, and the
    first three of fields of a tar's JSON members; None looks for usual ones. pixels: the most that
    an image may declare. bytes: the most of one image, text, line or member of a tar.
    """

    content: str = "auto"
    labels: bool = False
    classes: tuple[str, ...] = ()
    image: str | None = None
    text: str | None = None
    label: str | None = None
    key: str | None = None
    pixels: int = 64_000_000
    bytes: int = 2**26

    def __post_init__(self) -> None:
        if self.content not in CONTENTS:
            raise unknown("content", self.content, CONTENTS)
        require_whole("pixels", self.pixels, 1)
        require_whole("bytes", self.bytes, 1)
        object.__setattr__(self, "classes", tuple(self.classes))
        if len(set(self.classes)) < len(self.classes):
            raise RequestError(f"classes names one class twice: {', '.join(self.classes)}")

    def changed(self) -> dict[str, Any]:
        """The options that are not as by default, as plain JSON values."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        usual = {f.name: f.default for f in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value != usual[name]
        }
