"""What can be chosen about the clicks task, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError, unknown
from sparing.tasks.clicks.models import KINDS, Shape

DATASETS = ("retail-small", "retail")
_OF_FILES = ("label", "categorical", "numeric", "text", "time", "development", "test")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ClicksOptions:
    """Data, model and evaluation of click prediction.

    ``dataset``: the whole retail promotion log, or the sample of it that is shipped; both are
    split by week. Or ``path``: Parquet or CSV files of your own, or a directory of them, with the
    column ``label`` of 0 and 1 (if left out, the one called label, click, target or alike); the
    features are the columns ``categorical`` and ``numeric``, or, if neither is named, all others
    by their types; ``text`` names categorical columns that only look like whole numbers. With a
    column ``time``, rows before ``development`` are trained on and those from ``test`` on are the
    test, in its unit; without one, both are shares of the rows,
    drawn by hash. ``split``: evaluate on the ``test`` rows, or, to choose settings by, on the
    ``development`` rows; neither is trained on in either case.

    Values that occur less than ``cut_off`` times in training count as unseen; ``buckets`` hashes
    values into that many ids instead. ``rows``: train on that many of the training rows, drawn by
    lot, the same for every seed. ``hold``: the training rows in ``memory``, or on the ``disk``;
    ``auto``, in memory up to 2 GiB. ``model`` and what follows: see ``ClickModel`` and ``Shape``;
    ``rates``: the model also gets the log-odds of smoothed target rates (see ``reference``) as a
    number, and begins at them; training rows, those of counts without their own fold of five.
    ``sparse``: gradients of tables hold the touched rows only. ``eval_batch`` rows are evaluated
    at a time.

    Raises RequestError for names that are not known and numbers that do not fit.
    """

    dataset: Literal["retail-small", "retail"] = "retail-small"
    path: str | None = None
    label: str | None = None
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    time: str | None = None
    development: float | None = None
    test: float | None = None
    split: Literal["test", "development"] = "test"
    cut_off: int = 1
    buckets: int = 0
    rows: int | None = None
    hold: Literal["auto", "memory", "disk"] = "auto"
    model: str = "deepfm"
    dim: int = 10
    std: float = 0.01
    widths: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.0
    cross_layers: int = 3
    rank: int = 32
    experts: int = 4
    cin_widths: tuple[int, ...] = (100, 100)
    rates: bool = False
    sparse: bool = False
    eval_batch: int = 16_384

    def __post_init__(self) -> None:
        for name in ("categorical", "numeric", "text", "widths", "cin_widths"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        if self.dataset not in DATASETS:
            raise unknown("dataset", self.dataset, DATASETS)
        if self.split not in ("test", "development"):
            raise RequestError(f'split must be test or development, got "{self.split}"')
        if self.hold not in ("auto", "memory", "disk"):
            raise RequestError(f'hold must be auto, memory or disk, got "{self.hold}"')
        if self.model not in KINDS:
            raise unknown("model", self.model, KINDS)
        self._check_files()
        require_whole("cut_off", self.cut_off, 1)
        require_whole("buckets", self.buckets, 0)
        require_whole("eval_batch", self.eval_batch, 1)
        if self.rows is not None:
            require_whole("rows", self.rows, 2)
        if self.rates and not KINDS[self.model].linear:
            able = ", ".join(name for name, kind in KINDS.items() if kind.linear)
            raise RequestError(
                f"rates are a linear term, which {self.model} has not; take one of {able}"
            )
        self.shape()

    def _check_files(self) -> None:
        if self.path is None:
            if self.buckets and self.dataset == "retail":
                raise RequestError(
                    "the whole log is read with a vocabulary: leave buckets out, or give the files "
                    "of a log of your own by path"
                )
            for name in _OF_FILES:
                if getattr(self, name) not in (None, ()):
                    raise RequestError(
                        f"{name} is for files of your own: give their path, or leave it out, "
                        f"since the columns and parts of {self.dataset} are known"
                    )
            return
        for name in ("development", "test"):
            value = getattr(self, name)
            if self.time is not None and value is None:
                raise RequestError(
                    f'{name} must say from which value of "{self.time}" on rows belong to it'
                )
            if self.time is not None and value != int(value):
                raise RequestError(f"{name} must be a whole number, a time, got {value}")
            if self.time is None and value is not None:
                require_number(f"{name} without a column time is a share of the rows:", value, 0, 1)

    def shape(self) -> Shape:
        """The model's sizes."""
        return Shape(
            dim=self.dim,
            std=self.std,
            widths=self.widths,
            dropout=self.dropout,
            cross_layers=self.cross_layers,
            rank=self.rank,
            experts=self.experts,
            cin_widths=self.cin_widths,
        )
