"""Where this library keeps what is expensive to make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/sparing``, or ``~/.cache/sparing``; it may not exist yet."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path(os.path.expanduser("~"), ".cache")) / "sparing"
