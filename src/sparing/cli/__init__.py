"""The command line. Progress goes to stderr, results to stdout."""

from __future__ import annotations

from sparing.cli import catalogue, compare, convert, grow, pool, pool_find, runs
from sparing.cli.common import app

__all__ = ["app", "catalogue", "compare", "convert", "grow", "main", "pool", "pool_find", "runs"]


def main() -> None:
    """The console script."""
    app()
