"""Instruction tuning on many sources: loss on completions, packing, held-out loss by source."""

from sparing.tasks.instruct.instruct import Instruct
from sparing.tasks.instruct.options import InstructOptions

__all__ = ["Instruct", "InstructOptions"]
