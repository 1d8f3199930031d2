"""What can be chosen about the language task, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown
from sparing.tasks.language.corpus import DOMAINS

BYTES = 256
"""The vocabulary: one token per byte."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageOptions:
    """Data, model shape and evaluation of the byte-level language task.

    ``domains``: which texts. ``split``: evaluate on the ``final`` held-out text; or, to choose
    settings by, on a ``development`` part of the training text, which is then not trained on.
    ``seq_len``: bytes that a sample predicts. ``windows_per_domain``: train on so many windows of
    each domain at most, spread evenly (None: on all), so that epochs repeat soon. The model is a
    transformer of the LLaMA architecture: ``dim`` wide, ``layers`` deep, with ``heads`` query
    heads over ``kv_heads`` key-value heads (None: as many), gated feed-forward blocks ``width``
    wide, initialised with standard deviation ``init_std``, its embedding with ``embed_std`` (None:
    the same), and with ``zero_output`` the last projection of every block with zeros; ``tied``
    shares the embedding with the output. ``vocab`` is 256, since tokens are bytes.
    ``eval_windows`` held-out windows per domain are scored, ``eval_batch`` at a time.
    ``sample_bytes`` and ``passage_bytes``: how much text the page shows per domain.

    Raises RequestError for unknown, repeated or no domains and for numbers that do not fit.
    """

    domains: tuple[str, ...] = ("shakespeare", "gsm8k", "python")
    split: Literal["final", "development"] = "final"
    seq_len: int = 256
    windows_per_domain: int | None = None
    vocab: int = BYTES
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    width: int = 384
    init_std: float = 0.02
    embed_std: float | None = None
    zero_output: bool = False
    rope_theta: float = 10000.0
    tied: bool = False
    eval_windows: int = 96
    eval_batch: int = 16
    sample_bytes: int = 200
    passage_bytes: int = 400

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", _names(self.domains))
        for name in self.domains:
            if name not in DOMAINS:
                raise unknown("domain", name, DOMAINS)
        if not self.domains:
            raise RequestError(f"domains is empty; name at least one of {', '.join(DOMAINS)}")
        if len(set(self.domains)) < len(self.domains):
            raise RequestError(f"domains names one twice: {', '.join(self.domains)}")
        if self.split not in ("final", "development"):
            raise RequestError(f'split must be final or development, got "{self.split}"')
        for option, least in (
            ("seq_len", 2),
            ("dim", 1),
            ("layers", 1),
            ("heads", 1),
            ("width", 1),
            ("eval_windows", 1),
            ("eval_batch", 1),
            ("sample_bytes", 1),
            ("passage_bytes", 1),
        ):
            require_whole(option, getattr(self, option), least)
        if self.windows_per_domain is not None:
            require_whole("windows_per_domain", self.windows_per_domain, 1)
        require_whole("vocab", self.vocab, 1)
        if self.vocab != BYTES:
            raise RequestError(
                f"vocab {self.vocab} does not fit: tokens are bytes, set vocab to {BYTES}"
            )
        self._check_heads()
        for option in ("init_std", "embed_std", "rope_theta"):
            value = getattr(self, option)
            if value is None and option == "embed_std":
                continue
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise RequestError(f"{option} must be a positive number, got {value!r}")

    def _check_heads(self) -> None:
        if self.kv_heads is not None:
            require_whole("kv_heads", self.kv_heads, 1)
        if self.dim % self.heads:
            raise RequestError(f"dim {self.dim} must be a multiple of heads {self.heads}")
        if (self.dim // self.heads) % 2:
            raise RequestError(
                f"dim / heads = {self.dim // self.heads} must be even for rotary positions"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise RequestError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")


def _names(given: Iterable[str]) -> tuple[str, ...]:
    """A recipe gives a list, a command line perhaps a single word."""
    return (given,) if isinstance(given, str) else tuple(given)
