"""Text that was read and text that was written: bytes coloured by experts, and samples."""

from __future__ import annotations

from typing import Any, Final

from sparing.run.report.read import Run, number
from sparing.run.report.words import picture, significant, visible

LEVELS: Final = 9
"""Colours of the ramp, ``r0`` to ``r8`` in the style sheet."""


def coloured(run: Run) -> dict[str, Any] | None:
    """Passages as runs of equal colour: (level, what a pointer shows, pieces of text)."""
    found = [p for p in run.page.get("passages") or [] if p.get("bytes") and p.get("k")]
    ks = sorted(k for p in found for v in p["k"] if (k := number(v)) is not None)
    if not ks:
        return None
    # The ends of the ramp are quantiles: one odd byte should not wash out all others.
    low, high = ks[len(ks) // 100], ks[-1 - len(ks) // 100]
    whole = all(k == int(k) for k in ks)
    spans = [(p["domain"], _runs(bytes(p["bytes"]), p["k"], low, high)) for p in found]
    if whole and high - low < LEVELS:
        stops = [low + i for i in range(int(high - low) + 1)]
    else:
        stops = [low + (high - low) * i / 4 for i in range(5)]
    legend = [(_level(stop, low, high), f"{stop:.{0 if whole else 1}f}") for stop in stops]
    return {"passages": spans, "legend": legend, "whole": whole}


def samples(run: Run) -> list[dict[str, str]]:
    """Generated samples with control characters made visible."""
    return [
        {
            "domain": str(sample.get("domain") or ""),
            "prompt": visible(str(sample.get("prompt") or "")),
            "text": visible(str(sample.get("text") or "")),
        }
        for sample in run.page.get("samples") or []
        if isinstance(sample, dict)
    ]


def _level(k: float, low: float, high: float) -> int:
    if high <= low:
        return LEVELS // 2
    return round((LEVELS - 1) * min(1.0, max(0.0, (k - low) / (high - low))))


def _runs(
    data: bytes, ks: list[Any], low: float, high: float
) -> list[tuple[int, str, list[tuple[str, str]]]]:
    """Neighbouring characters of equal colour together; a piece is (style, text).

    A character of several bytes takes their mean k. Spaces, tabs and line ends keep themselves,
    so that a copy is the original, and the style sheet adds a faint sign.
    """
    found: list[tuple[int, str, list[tuple[str, str]]]] = []
    at = 0
    while at < len(data):
        text, size = _character(data, at)
        values = [k for v in ks[at : at + size] if (k := number(v)) is not None]
        at += size
        mean = sum(values) / len(values) if values else low
        level = _level(mean, low, high)
        piece = {" ": ("s", " "), "\n": ("n", "\n"), "\t": ("t", "\t")}.get(text)
        if piece is None:
            piece = ("x" if len(text) > 1 else "", text)
        if not found or found[-1][0] != level:
            found.append((level, significant(mean, 2), []))
        pieces = found[-1][2]
        if pieces and pieces[-1][0] == piece[0] == "":
            pieces[-1] = ("", pieces[-1][1] + piece[1])
        else:
            pieces.append(piece)
    return found


def _character(data: bytes, at: int) -> tuple[str, int]:
    """The character that begins at ``at`` and its bytes; a byte that begins none stands alone."""
    first = data[at]
    size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    if first in (0x0A, 0x09) or 0x20 <= first < 0x7F:
        return chr(first), 1
    if size > 1:
        try:
            text = data[at : at + size].decode("utf-8")
            return (text if text.isprintable() else picture(ord(text))), size
        except UnicodeDecodeError:
            pass
    return picture(first), 1
