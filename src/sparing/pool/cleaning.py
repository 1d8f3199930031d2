"""What a pool does to what arrives, before it values it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sparing.core.checks import require_number


@final
@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """copies: cosine distance up to which items are near copies, of which one is kept; -1 for none.

    misaligned: the share of wrong pairs of image and text that may be kept, see ``alignment``; 0
    keeps all pairs. It needs an encoder of both.
    """

    copies: float = 0.02
    misaligned: float = 0.01

    def __post_init__(self) -> None:
        require_number("copies", self.copies, -1, 2)
        require_number("misaligned", self.misaligned, 0, 0.5)


NO_CLEANING = Cleaning(copies=-1, misaligned=0)
