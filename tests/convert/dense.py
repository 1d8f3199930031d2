"""Dense models on disk to convert."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tests.experts.zoo import build
from torch import Tensor

import sparing

STORIES = Path(sparing.__file__).parent / "tasks" / "language" / "data" / "stories260k"


def saved(folder: Path, name: str, *, shard: str | None = None, **changes: Any) -> Path:
    """A tiny model of a family of the zoo, as transformers writes it."""
    path = folder / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(name, **changes).save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return path


def load(path: Path) -> Any:
    """With plain transformers, or ``sparing.load`` where there is ``sparing.json``."""
    import transformers

    if (path / "sparing.json").is_file():
        return sparing.load(path)
    import json

    kind = json.loads((path / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(path).eval()


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits
    return found
