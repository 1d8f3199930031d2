"""``sparing grow`` killed at many points and begun again; prints what each pool then holds.

Each command is a fork of this process, since imports take most of the time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparing.pool.encoders.images
import sparing.pool.sources  # noqa: F401  before the forks
from sparing.cli import app
from sparing.pool.growth import Growth
from sparing.pool.store import Store, check


def killing(owner: type, name: str, call: int, *, after: bool) -> Callable[[], None]:
    """Before, or after, the call of that number of a method, the process is killed."""

    def patch() -> None:
        usual, calls = getattr(owner, name), [0]

        def method(*given: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = usual(*given, **more)
            if calls[0] == call and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, method)

    return patch


def forked(arguments: list[str], patch: Callable[[], None] | None = None) -> int:
    child = os.fork()
    if child == 0:
        try:
            if patch is not None:
                patch()
            app(arguments, standalone_mode=False)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def held(store: Path) -> dict[str, Any]:
    with Store.open(store) as view:
        gains = view.scores("gain").tolist()
        return {
            "ids": view.ids().tolist(),
            "keys": view.column("key").tolist(),
            "reasons": view.column("reason").tolist(),
            "gains": [None if gain != gain else round(gain, 5) for gain in gains],
            "drops": sorted([drop.key, drop.reason, drop.detail] for drop in view.drops()),
            "cursors": view.sources(),
            "problems": check(store),
        }


def main(place: Path, only: list[str], sources: list[str]) -> None:
    options = ["--batch", "16", "--budget", "40", "--quiet", "--no-report", "--seed", "3"]
    points: dict[str, Callable[[], None] | None] = {"not killed": None}
    for call in (1, 3):
        points[f"before batch {call}"] = killing(Growth, "add", call, after=False)
        points[f"in batch {call}"] = killing(Store, "append", call, after=True)
        points[f"after batch {call}"] = killing(Growth, "add", call, after=True)
    points["before the budget"] = killing(Growth, "evict", 1, after=False)
    points["after the budget"] = killing(Growth, "evict", 1, after=True)
    points["before the snapshot"] = killing(Growth, "snapshot", 1, after=False)
    points["before it is closed"] = killing(Growth, "close", 1, after=False)
    found: dict[str, Any] = {}
    for name in only or points:
        patch = points[name]
        store = place / name.replace(" ", "-")
        command = ["grow", str(store), *sources, *options]
        first = forked(command, patch)
        again = forked(command)
        found[name] = {"first": first, "again": again, **held(store)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name], sys.argv[3:])
