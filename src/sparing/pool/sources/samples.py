"""A sample of a WebDataset tar: members of one name made into an item."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, final

from sparing.pool.items import UNLABELLED, Drop, Item
from sparing.pool.sources import content
from sparing.pool.sources.reading import Reading, Unreadable
from sparing.pool.sources.rows import USUAL

_TEXTS: Final = (".txt", ".text", ".caption")
T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of a tar; ``wrong`` tells why its bytes are not taken."""

    name: str
    data: bytes
    wrong: str
    suffix: str  # ".jpg"


@final
@dataclass(slots=True, kw_only=True)
class Sample:
    """The members of one name, in the tar's order."""

    stem: str
    key: str
    members: list[Member] = field(default_factory=list)
    cut: bool = False  # the file ends before all of it was read

    def parts(self, reading: Reading) -> set[str]:
        """Which of image and text its members hold; nothing is decoded but JSON."""
        found: set[str] = set()
        for member in self.members:
            if member.wrong:
                continue
            if member.suffix in content.IMAGES:
                found.add("image")
            elif member.suffix in _TEXTS:
                found.add("text")
            elif member.suffix == ".json":
                try:
                    if _of(_fields(member), "text", reading) is not None:
                        found.add("text")
                except Unreadable:
                    continue
        return found

    def suffixes(self) -> frozenset[str]:
        """The kinds of its members: ".jpg", ".txt"."""
        return frozenset(member.suffix for member in self.members)

    def outcome(self, wanted: frozenset[str], reading: Reading) -> Item | Drop:
        """The sample's item with the parts that are wanted, or why it is dropped."""
        key = self.key.encode("utf-8", "backslashreplace").decode()
        try:
            return self._item(key, wanted, reading)
        except Unreadable as error:
            return Drop(key=key, reason="unreadable", detail=f"{key}: {error}")

    def _item(self, key: str, wanted: frozenset[str], reading: Reading) -> Item:
        if self.cut:
            raise Unreadable("the tar ends before all of its members")
        wrong = [f"member {_shown(m.name)} {m.wrong}" for m in self.members if m.wrong]
        if wrong:
            raise Unreadable("; ".join(dict.fromkeys(wrong)))
        pictures = self._only("image", content.IMAGES)
        words = self._only("text", _TEXTS)
        other = self._only("JSON", (".json",))
        fields = {} if other is None else _fields(other)
        told = _of(fields, "text", reading) if words is None else None
        if (pictures is None and words is None and told is None) or not wanted:
            held = ", ".join(_shown(m.name) for m in self.members[:4])
            raise Unreadable(f"no image ({', '.join(content.IMAGES)}) and no text among {held}")
        image = text = None
        if "image" in wanted:
            if pictures is None:
                raise Unreadable("a caption without image")
            image = _from(pictures, lambda data: content.image(data, reading))
        if "text" in wanted:
            if words is not None:
                text = _from(words, content.text)
            elif isinstance(told, str):
                text = content.worded(told)
            elif told is None:
                raise Unreadable("an image without caption")
            else:
                raise Unreadable(f"the caption is a {type(told).__name__}, no text")
        return Item(key=key, image=image, text=text, label=self._label(fields, reading))

    def _only(self, what: str, suffixes: tuple[str, ...]) -> Member | None:
        found = [member for member in self.members if member.suffix in suffixes]
        if len(found) > 1:
            names = ", ".join(_shown(member.name) for member in found)
            raise Unreadable(f"it has {len(found)} {what} members: {names}")
        return found[0] if found else None

    def _label(self, fields: dict[str, Any], reading: Reading) -> int:
        member = self._only("label", (".cls",))
        if member is not None:
            return content.label(_from(member, lambda data: content.text(data, "label")), reading)
        given = _of(fields, "label", reading)
        return UNLABELLED if given is None else content.label(given, reading)


def _fields(member: Member) -> dict[str, Any]:
    try:
        held = json.loads(member.data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{_shown(member.name)} is not JSON in UTF-8 ({error})") from None
    if not isinstance(held, dict):
        raise Unreadable(f"{_shown(member.name)} is a JSON {type(held).__name__}, no object")
    return held


def _of(fields: dict[str, Any], part: str, reading: Reading) -> Any:
    """The field of a JSON member by the option's name or by a usual one; None without it."""
    given = getattr(reading, part)
    names = USUAL[part] if given is None else (given,)
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _from(member: Member, made: Callable[[bytes], T]) -> T:
    """What is made of the member's bytes, with its name in what is wrong."""
    try:
        return made(member.data)
    except Unreadable as error:
        raise Unreadable(f"{_shown(member.name)}: {error}") from None


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
