"""The vectors of whole training sets, kept in the user's cache by content and encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparing.core.cache import cache_folder
from sparing.core.state import atomic_save

MOST: Final = 8
"""Files that are kept; the oldest go first."""
_FORMAT: Final = 1


def place(version: str, digest: str) -> Path:
    """Where the vectors of the data with this hash, by this version of an encoder, are kept."""
    name = hashlib.sha256(f"{_FORMAT} {version} {digest}".encode()).hexdigest()[:24]
    return cache_folder() / "growth" / f"{name}.safetensors"


def kept(path: Path, size: int) -> tuple[Tensor, int] | None:
    """Vectors (size, d) and the FLOPs that they cost; None where there are none or damaged ones."""
    try:
        with safe_open(path, framework="pt") as file:
            vectors = file.get_tensor("vectors")
            flops = int(file.get_tensor("flops"))
    except (OSError, SafetensorError):
        return None
    path.touch()  # used last
    return (vectors, flops) if len(vectors) == size else None


def keep(path: Path, vectors: Tensor, flops: Tensor) -> None:
    """Write vectors, and drop the files that were not used for longest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_save(path, {"vectors": vectors, "flops": flops})
    others = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for file in others[:-MOST]:
        file.unlink(missing_ok=True)
