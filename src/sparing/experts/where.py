"""Which feed-forward blocks a request names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from sparing.core.errors import RequestError, nearest

Where = None | str | int | Callable[[str, nn.Module], bool] | Iterable[str | int]
"""None: all blocks. A string: a block's name, the name of a module around blocks, a glob or a
regular expression of the whole name. An integer: the position of a block, from 0, or from the end
if negative. Several of these: all that any of them names. A function: (name, module) -> bool."""


def select(where: Where, blocks: Mapping[str, nn.Module]) -> list[str]:
    """The names of the blocks that ``where`` names, in the order of ``blocks``.

    blocks: each block's module by its name. Raises RequestError if any part of ``where`` names
    none, with the nearest name.
    """
    names = list(blocks)
    if where is None:
        return names
    if callable(where):
        chosen = [name for name in names if where(name, blocks[name])]
        if not chosen:
            raise RequestError(
                f"where(name, module) chose none of the model's {len(names)} feed-forward blocks: "
                f"{', '.join(names)}"
            )
        return chosen
    parts = [where] if isinstance(where, str | int) else list(where)
    if not parts:
        raise RequestError("where names no feed-forward block; leave it out to take all")
    found = {name for part in parts for name in _named(part, names)}
    return [name for name in names if name in found]


def _named(part: str | int, names: list[str]) -> list[str]:
    if isinstance(part, bool) or not isinstance(part, str | int):
        raise RequestError(
            f"where takes names, globs, regular expressions, integers or a function, got {part!r}"
        )
    if isinstance(part, int):
        if not -len(names) <= part < len(names):
            raise RequestError(
                f"there is no feed-forward block {part}: the model has {len(names)}, "
                f"0 to {len(names) - 1}"
            )
        return [names[part]]
    for matches in (_inside, fnmatchcase, _regular):
        found = [name for name in names if matches(name, part)]
        if found:
            return found
    raise RequestError(f'unknown layer "{part}"; {nearest(part, names)}')


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _regular(name: str, part: str) -> bool:
    try:
        return re.fullmatch(part, name) is not None
    except re.error:
        return False
