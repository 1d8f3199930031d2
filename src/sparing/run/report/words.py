"""Numbers, names and bytes in the words and signs that a reader expects."""

from __future__ import annotations

import re
from typing import Final

_PREFIXES: Final = (
    (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"),
)  # fmt: skip
MINUS: Final = "\N{MINUS SIGN}"
DASH: Final = "\N{EN DASH}"
THIN: Final = "\N{NARROW NO-BREAK SPACE}"


def prefix(value: float) -> tuple[float, str]:
    """The SI prefix that suits ``value``: 3.5e6 -> (1e6, "M")."""
    for size, sign in _PREFIXES:
        if abs(value) >= size:
            return size, sign
    return 1.0, ""


def significant(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and no exponent: 41.27 -> 41.3."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text:
        text = f"{float(text):,.0f}" if abs(value) >= 1 else f"{float(text):.{digits + 3}f}"
    return text.replace("-", MINUS)


def count(value: float) -> str:
    """3511296 -> 3.51 M; below ten thousand in full, 8,192."""
    if abs(value) < 10_000:
        return f"{round(value):,}".replace("-", MINUS)
    size, sign = prefix(value)
    return f"{significant(value / size)}{THIN}{sign}"


def amount(value: float, unit: str) -> str:
    """A quantity of a ledger unit in human units: 1.2e12 flops -> 1.2 TFLOP."""
    if unit in ("flops", "bytes"):
        size, sign = prefix(value)
        return f"{significant(value / size)}{THIN}{sign}{'FLOP' if unit == 'flops' else 'B'}"
    return count(value)


def percent(fraction: float, digits: int = 0) -> str:
    """0.412 -> 41 %; what is small but not nothing stays visible: < 1 %."""
    if 0 < abs(fraction) < 0.5 * 10 ** (-2 - digits):
        return f"<{THIN}{10**-digits:g}{THIN}%"
    return f"{100 * fraction:.{digits}f}".replace("-", MINUS) + f"{THIN}%"


def duration(seconds: float) -> str:
    """221.4 -> 3 min 41 s."""
    if seconds < 10:
        return f"{seconds:.1f}{THIN}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{THIN}s"
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60}{THIN}s"
    return f"{whole // 3600}{THIN}h {whole % 3600 // 60}{THIN}min"


def metric_name(name: str) -> str:
    """bits_per_byte -> bits per byte."""
    return name.replace("_", " ")


def device(name: str) -> str:
    """A processor's name without its trade marks and clock: Intel Xeon Platinum 8481C."""
    name = re.sub(r"\((R|TM|C)\)", "", name, flags=re.IGNORECASE)
    return " ".join(re.sub(r"\bCPU\b|@.*$|\b\d+-Core\b|\bProcessor\b", "", name).split()) or name


def listing(words: list[str]) -> str:
    """[a, b, c] -> a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(word: str) -> str:
    """class -> classes, domain -> domains."""
    return word + ("es" if word.endswith("s") else "s")


def layer_name(path: str) -> str:
    """A module path in short, by its first number: model.layers.3.mlp -> layer 3."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return f"layer {found.group(1)}" if found else path


def picture(code: int) -> str:
    """The escape shown for a control character, or for a byte that is no text."""
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def visible(text: str) -> str:
    """``text`` with control characters shown as signs; line breaks and tabs stay."""
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or c.isprintable() else picture(ord(c)) for c in text)
