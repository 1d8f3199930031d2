"""Checks of what users give: numbers, and names of options."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from sparing.core.errors import RequestError, nearest


def require_whole(name: str, value: object, least: int) -> None:
    """Raise RequestError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise RequestError(f"{name} must be at least {least}, got {value}")


def require_number(
    name: str, value: object, least: float = -math.inf, most: float = math.inf
) -> None:
    """Raise RequestError unless ``value`` is a number, not NaN, from ``least`` to ``most``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, got {value!r}")
    if least <= value <= most:
        return
    if most == math.inf:
        raise RequestError(f"{name} must be at least {least:g}, got {value}")
    raise RequestError(f"{name} must be in [{least:g}, {most:g}], got {value}")


def require_known(name: str, given: Iterable[Any], kind: Any) -> None:
    """Raise RequestError for an option that the dataclass ``kind`` does not have."""
    known = [f.name for f in fields(kind)]
    for key in given:
        if key not in known:
            raise RequestError(f'{name} has no option "{key}"; {nearest(str(key), known)}')
