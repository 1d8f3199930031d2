"""A comparison as a record: every run, by which command, code and machine."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparing.core.state import atomic_write_text
from sparing.run.compare.finished import Comparison
from sparing.run.compare.found import read_json
from sparing.run.record import environment


def _references(comparison: Comparison) -> dict[str, Any]:
    """What known methods reach on the same held-out data, as a run recorded it; {} if none did."""
    for arm in comparison.arms:
        for run in arm.finished:
            file = run.path / "page.json"
            if file.is_file():
                found: dict[str, Any] = read_json(file).get("references") or {}
                return found
    return {}


def write(path: Path, comparison: Comparison) -> Path:
    """Write the comparison and all that is needed to repeat it to the file ``path``."""
    results = comparison.to_dict()
    for arm in results["arms"].values():
        arm.pop("command", None)
        for run in arm["runs"]:
            del run["path"]  # places on one machine mean nothing on another
    results["references"] = _references(comparison)
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
