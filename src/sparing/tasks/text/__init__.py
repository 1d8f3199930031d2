"""Text classification with an encoder: AG News, or which of three sources a passage comes from."""

from sparing.tasks.text.options import TextOptions
from sparing.tasks.text.text import Text

__all__ = ["Text", "TextOptions"]
