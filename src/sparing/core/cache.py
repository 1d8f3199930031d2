"""Where this library keeps what is expensive to make again, and looks for data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/sparing``, or ``~/.cache/sparing``; it may not exist yet."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path(os.path.expanduser("~"), ".cache")) / "sparing"


def places(folder: str) -> list[Path]:
    """Where to look for data: in ``$SPARING_DATA`` first, then in the user's cache."""
    given = os.environ.get("SPARING_DATA", "")
    roots = [Path(given)] if given else []
    return [root / folder for root in [*roots, cache_folder()]]
