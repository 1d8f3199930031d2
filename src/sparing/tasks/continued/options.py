"""What can be chosen about continued pre-training, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.tasks.causal import STORIES
from sparing.tasks.language.corpus import DOMAINS

OWN = "own"
"""The domain that the model writes itself."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuedOptions:
    """Model, data and evaluation of continued pre-training.

    ``model``: the directory of a trained causal language model with its tokenizer; ``stories260k``
    is shipped. ``domains``: ``own``, text that the model draws from its
    first token at ``temperature``, ``shakespeare``, ``gsm8k`` and ``python``, which are shipped
    with the language task, and the names in ``files``: your own, plain text or JSON lines with
    ``text``, of which the last tenth is held out. ``windows``: of each domain to train on, at
    most; the model writes as many. ``seq_len``: tokens that a window predicts.
    ``split``: evaluate on the ``final`` held-out text, or on a ``development`` one to choose
    settings by. ``eval_windows`` of each domain are scored, ``eval_batch`` at a time.
    ``own_seed``: of what the model writes, the same for every seed of training.
    ``sample_tokens``: how much text the page shows per domain.

    Raises RequestError for what does not fit together.
    """

    model: str = STORIES
    domains: tuple[str, ...] = (OWN, "shakespeare", "gsm8k")
    files: Mapping[str, str] | None = None
    split: Literal["final", "development"] = "final"
    seq_len: int = 256
    windows: int = 1000
    temperature: float = 1.0
    own_seed: int = 0
    eval_windows: int = 64
    eval_batch: int = 16
    sample_tokens: int = 80

    def __post_init__(self) -> None:
        given: Iterable[str] = (self.domains,) if isinstance(self.domains, str) else self.domains
        object.__setattr__(self, "domains", tuple(given))
        files = {str(k): str(v) for k, v in (self.files or {}).items()}
        if self.files is not None:
            object.__setattr__(self, "files", files)
        for name in files:
            if name == OWN or name in DOMAINS:
                raise RequestError(f'files names "{name}", which is a domain already; rename it')
            if name not in self.domains:
                object.__setattr__(self, "domains", (*self.domains, name))
        known = (OWN, *DOMAINS, *files)
        for name in self.domains:
            if name not in known:
                raise unknown("domain", name, known)
        if not self.domains:
            raise RequestError(f"domains is empty; name at least one of {', '.join(known)}")
        if len(set(self.domains)) < len(self.domains):
            raise RequestError(f"domains names one twice: {', '.join(self.domains)}")
        if self.split not in ("final", "development"):
            raise RequestError(f'split must be final or development, got "{self.split}"')
        require_whole("seq_len", self.seq_len, 2)
        for name in ("windows", "eval_windows", "eval_batch", "sample_tokens"):
            require_whole(name, getattr(self, name), 1)
        require_whole("own_seed", self.own_seed, 0)
        require_number("temperature", self.temperature, 0.01)
