"""What can be chosen about the text task, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError, unknown

DATASETS = ("passages", "agnews")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """Data, encoder and evaluation of text classification.

    ``dataset``: ``passages``, short passages of the texts of the language task, to be put with
    their source; or ``agnews``, news in four classes, which is not shipped. ``split``: evaluate on
    the ``test`` texts; or, to choose settings by, on the ``development`` texts. The training texts
    are the same for both, and neither is among them. ``encoder``: ``tiny``, a BERT of three layers
    that reads bytes and has learned to predict hidden ones (data/README.md tells how); ``random``,
    the same with random weights; ``minilm``, all-MiniLM-L6-v2 from an installed package; or the
    folder of any encoder in Hugging Face's format with its tokenizer. The classifier is
    the encoder, the mean over a text's tokens and a linear layer. ``freeze``: train everything
    (``none``), or only that linear layer (``encoder``). Texts are cut after ``max_length`` tokens;
    ``eval_batch`` texts are evaluated at a time.

    Raises RequestError for names that are not known and numbers that do not fit.
    """

    dataset: Literal["passages", "agnews"] = "passages"
    split: Literal["test", "development"] = "test"
    encoder: str = "tiny"
    freeze: Literal["none", "encoder"] = "none"
    max_length: int = 128
    eval_batch: int = 64

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown("dataset", self.dataset, DATASETS)
        if self.split not in ("test", "development"):
            raise RequestError(f'split must be test or development, got "{self.split}"')
        if self.freeze not in ("none", "encoder"):
            raise RequestError(f'freeze must be none or encoder, got "{self.freeze}"')
        if not isinstance(self.encoder, str) or not self.encoder:
            raise RequestError(
                "encoder must be tiny, random, minilm or the path of a folder, "
                f"got {self.encoder!r}"
            )
        require_whole("max_length", self.max_length, 3)
        require_whole("eval_batch", self.eval_batch, 1)
