"""What can be chosen about the instruction task, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown

DATASETS = ("derived", "t0", "files")
SPLITS = ("final", "development")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class InstructOptions:
    """Data, model shape and evaluation of the instruction task.

    ``dataset``: ``derived``, nine small tasks made of the texts that are shipped; ``t0``, T0's
    templates grouped into eight sources, from ``$SPARING_DATA``; ``files``, your own, by source in
    ``files``: JSON lines with ``prompt`` and ``completion``, or with ``messages``. ``sources``:
    some of them only. ``per_source``: training examples of each at most (None: all).
    ``split``: evaluate on ``final`` held-out examples, or on ``development`` ones. ``held_out``:
    share of the examples of each part in ``files``.
    ``model``: the directory of a trained causal model to start from, dense or of experts, or
    ``stories260k``, which is shipped; None: a fresh one of the shape below.
    ``tokenizer``: the path of a Hugging Face tokenizer, whose chat template is used; None: that
    of ``model``, or bytes.
    ``seq_len``: tokens of an example at most, and of a packed row. ``pack``: put several examples
    into a row; they do not see each other. A fresh model is a transformer of the LLaMA kind,
    ``dim`` wide, ``layers`` deep, with ``heads`` heads and feed-forward blocks ``width`` wide.
    ``eval_examples`` of each source are scored, ``eval_batch`` at a time.

    Raises RequestError for what does not fit together.
    """

    dataset: str = "derived"
    files: Mapping[str, str] | None = None
    sources: tuple[str, ...] | None = None
    per_source: int | None = None
    split: str = "final"
    held_out: float = 0.1
    model: str | None = None
    tokenizer: str | None = None
    seq_len: int = 192
    pack: bool = True
    dim: int = 64
    layers: int = 2
    heads: int = 2
    width: int = 128
    init_std: float = 0.02
    embed_std: float | None = None
    eval_examples: int = 64
    eval_batch: int = 32

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown("data set", self.dataset, DATASETS)
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)
        if (self.dataset == "files") != (self.files is not None):
            raise RequestError('files by source go with dataset "files": set both, or neither')
        if self.files is not None:
            if not self.files:
                raise RequestError("files names no source; give {name: path of JSON lines}")
            object.__setattr__(self, "files", {str(k): str(v) for k, v in self.files.items()})
        if self.sources is not None:
            given: Iterable[str] = (
                (self.sources,) if isinstance(self.sources, str) else self.sources
            )
            object.__setattr__(self, "sources", tuple(given))
            if not self.sources:
                raise RequestError("sources is empty; leave it out to take all")
        if self.per_source is not None:
            require_whole("per_source", self.per_source, 1)
        require_number("held_out", self.held_out, 0.01, 0.4)
        for name, least in (("seq_len", 8), ("dim", 1), ("layers", 1), ("heads", 1), ("width", 1)):
            require_whole(name, getattr(self, name), least)
        for name in ("eval_examples", "eval_batch"):
            require_whole(name, getattr(self, name), 1)
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise RequestError(
                f"dim {self.dim} must be an even multiple of heads {self.heads}, for rotary "
                "positions"
            )
        for name in ("init_std", "embed_std"):
            value = getattr(self, name)
            if value is not None:
                require_number(name, value, 1e-8)
