"""Training a trained causal language model on, on domains of text in its own tokens."""

from __future__ import annotations

from sparing.tasks.continued.continued import Continued
from sparing.tasks.continued.options import ContinuedOptions

__all__ = ["Continued", "ContinuedOptions"]
