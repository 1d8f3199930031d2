"""A comparison as a record: every run, by which command, code and machine."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparing.core.state import atomic_write_text
from sparing.run.compare.finished import Comparison
from sparing.run.record import environment


def write(path: Path, comparison: Comparison) -> Path:
    """Write the comparison and all that is needed to repeat it to the file ``path``."""
    results = comparison.to_dict()
    for arm in results["arms"].values():
        for run in arm["runs"]:
            del run["path"]  # places on one machine mean nothing on another
    record: dict[str, Any] = {
        "name": path.stem,
        "kind": "comparison",
        "command": results.pop("command", ""),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": environment(),
        "code": comparison.code,
        "seeds": results.pop("seeds", []),
        "note": "every run asked for: its metric, ledger and package hash, or why it has none",
        "results": results,
    }
    atomic_write_text(path, json.dumps(record, indent=1) + "\n")
    return path
