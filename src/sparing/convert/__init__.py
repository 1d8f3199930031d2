"""Dense checkpoints to experts and back."""

from __future__ import annotations

from sparing.convert.combining import combine
from sparing.convert.densifying import Densified, to_dense
from sparing.convert.options import Conversion
from sparing.convert.running import Converted, convert, plan

__all__ = ["Conversion", "Converted", "Densified", "combine", "convert", "plan", "to_dense"]
