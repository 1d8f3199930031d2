"""The state of methods in a checkpoint of Hugging Face's Trainer: a folder, a part of each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparing.core import ranks, state
from sparing.core.errors import RunError
from sparing.core.ledger import Ledger

DIRECTORY = "sparing"  # within a checkpoint


def write(directory: Path, tree: dict[str, Any], world: int) -> None:
    """Write this rank's ``tree``, whose ``ledger`` is this rank's own."""
    state.save(_part(directory, ranks.rank()), tree, meta={"world": world})


def read(directory: Path, world: int) -> dict[str, Any]:
    """This rank's tree, written on as many ranks or others; the ledgers of all are shared out.

    Raises RunError if there is none.
    """
    if not directory.is_dir():
        raise RunError(
            f"the checkpoint {directory.parent} holds no state of methods: it was written "
            "without them, or its writing was cut short. Resume from the one before it"
        )
    rank, saved = ranks.rank(), int(state.read(_part(directory, 0)).meta["world"])
    tree: dict[str, Any] = state.load(_part(directory, rank % saved))
    ledger = Ledger()
    for part in range(rank, saved, world):  # those of ranks that are no longer there too
        other = Ledger()
        other.load_state_dict(state.load(_part(directory, part))["ledger"])
        ledger.merge(other)
    return {**tree, "ledger": ledger.state_dict()}


def _part(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}"
