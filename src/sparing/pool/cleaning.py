"""What a pool does to what arrives, before it values it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.pool.copies.hashes import MOST


@final
@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """copies: cosine distance up to which items are near copies, of which one is kept; -1 for none.

    image_hash: image files are near copies too where so many bits of their perceptual hashes of 64
    differ at most, whatever the encoder makes of them; -1 for not. Items that are no image files,
    and images below 32 pixels, have no hash. Where ``copies`` is -1 it counts for nothing.

    misaligned: the share of wrong pairs of image and text that may be kept, see ``alignment``; 0
    keeps all pairs. It needs an encoder of both.
    """

    copies: float = 0.02
    image_hash: int = 4
    misaligned: float = 0.01

    def __post_init__(self) -> None:
        require_number("copies", self.copies, -1, 2)
        require_whole("image_hash", self.image_hash, -1)
        if self.image_hash > MOST:
            raise RequestError(
                f"image_hash must be at most {MOST} bits, got {self.image_hash}: with more, "
                "different images count as copies"
            )
        require_number("misaligned", self.misaligned, 0, 0.5)

    @property
    def bits(self) -> int:
        """Bits by which perceptual hashes of copies differ at most; -1 where nobody asks."""
        return self.image_hash if self.copies >= 0 else -1


NO_CLEANING = Cleaning(copies=-1, image_hash=-1, misaligned=0)
