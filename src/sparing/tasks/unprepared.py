"""What stands in for a task's data until it is loaded."""

from __future__ import annotations

from typing import NoReturn, final

from torch import Tensor

from sparing.core.errors import RequestError


@final
class Unprepared:
    """Stands in for data until ``prepare`` has loaded it; every use raises RequestError."""

    def __init__(self, task: str) -> None:
        self.task = task

    def _refuse(self) -> NoReturn:
        raise RequestError(f"the {self.task} task has no data yet; call prepare(seed) first")

    def __len__(self) -> int:
        self._refuse()

    def batch(self, index: Tensor) -> NoReturn:
        """Raises RequestError."""
        self._refuse()
