"""Errors that say what was wrong, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparingError(Exception):
    """Base of the errors that this library raises on purpose; ``exit_code`` is for the shell."""

    exit_code = 1


class RequestError(SparingError, ValueError):
    """The request is wrong: an unknown name, a bad value, files that do not fit (exit code 2)."""

    exit_code = 2


class RunError(SparingError, RuntimeError):
    """The request was right, the run failed: a NaN loss, a full disk, a broken file (exit 1)."""

    exit_code = 1


class DivergedError(RunError):
    """Training left the finite numbers; the same run would do so again (exit code 1)."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that names the nearest choice and lists all: ``did you mean "k"? Known: j, k``."""
    known = sorted(choices)
    folded = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    listing = ", ".join(known) if known else "none"
    hint = f'did you mean "{folded[close[0]]}"? ' if close else ""
    return f"{hint}Known: {listing}"


def unknown(kind: str, name: str, choices: Iterable[str]) -> RequestError:
    """The error for a name that is not among ``choices``."""
    return RequestError(f'unknown {kind} "{name}"; {nearest(name, choices)}')
