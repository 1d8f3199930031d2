"""The process of one run. It ends with the process that started it, however that one ends.

The request is a line of JSON on stdin, which then stays open: its end means that the parent is
gone. The answer is a line of JSON on stdout; progress goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from sparing.core.errors import SparingError


def main() -> int:
    """Run what stdin asks for; returns the exit code."""
    request: dict[str, Any] = json.loads(_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from sparing.run.progress import display
    from sparing.run.recipe import load
    from sparing.run.runner import run

    answer: dict[str, Any] = {}
    code = 0
    try:
        recipe = load(request["recipe"], request["overrides"], preset=request["preset"])
        run(
            recipe,
            request["out"],
            resume=request["resume"],
            display=display(),
            command=request["command"],
        )
    except SparingError as error:
        answer, code = {"error": str(error)}, error.exit_code
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return code


def _line() -> bytes:
    read = b""
    while not read.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            raise SystemExit("no request came on stdin")
        read += part
    return read


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing more is ever written: this returns when the other end is closed
    os._exit(3)  # a run survives a kill at any point; nothing is to be put in order


if __name__ == "__main__":
    sys.exit(main())
