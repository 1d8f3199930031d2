"""The task: rows of a log in, a click model on shared tables, one loss per row, AUC out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_known
from sparing.core.errors import DivergedError, RequestError
from sparing.core.modes import evaluating
from sparing.core.task import Samples
from sparing.tasks.clicks import page, prior, reference, sources
from sparing.tasks.clicks.auc import auc, placements
from sparing.tasks.clicks.calibration import calibration, log_loss
from sparing.tasks.clicks.dataset import Rows, drawn
from sparing.tasks.clicks.encoded import Encoded, tensors
from sparing.tasks.clicks.models import ClickModel
from sparing.tasks.clicks.options import ClicksOptions
from sparing.tasks.clicks.rates import log_odds, smoothed
from sparing.tasks.clicks.vocabulary import Vocabulary
from sparing.tasks.unprepared import Unprepared

DOMAIN: Final = "all rows"


@final
class Clicks:
    """Click prediction on a retail promotion log, a sample of it, or files of the user's own.

    Constructed from the keywords of ``ClicksOptions``; an unknown one raises RequestError. A
    sample is a row and its loss the binary cross entropy, in nats. The metric is the AUC in
    percent on held-out rows. If these are all positive or all negative it is undefined, and the
    log loss takes its place (``metric``, ``higher_is_better`` and ``remark`` then say so).
    """

    name: ClassVar[str] = "clicks"
    Options: ClassVar[type[Any]] = ClicksOptions
    metric: str = "auc"
    higher_is_better: bool = True
    evaluation: ClassVar[tuple[str, ...]] = (
        "dataset", "path", "label", "categorical", "numeric", "text", "time", "development",
        "test", "split", "cut_off", "buckets", "rows",
    )  # fmt: skip
    domain_name: ClassVar[str] = "part"
    about_metric: str = (
        "AUC is the percentage of pairs of a positive and a negative row, both unseen, in which "
        "the positive one has the higher score: 50 is chance, higher is better."
    )
    tokens_per_sample = 1
    domains: tuple[str, ...] = (DOMAIN,)

    def __init__(self, **options: Any) -> None:
        require_known("Clicks", options, ClicksOptions)
        self.options = ClicksOptions(**options)
        self.fingerprint: str = ""
        self.train: Samples = Unprepared("clicks")
        self.remark = ""
        self._time: str | None = None
        self._label = ""
        self._rates: prior.Rates | None = None
        self._vocabulary: Vocabulary | None = None
        self._rows: Rows | None = None
        self._held_out: Encoded | None = None
        self._last: tuple[str, Tensor, Tensor] | None = None

    def prepare(self, seed: int) -> None:
        """Read and encode the rows. They and their parts are the same for every ``seed``.

        Raises RequestError for data that is not at hand, cannot be read, or has an empty part.
        """
        options = self.options
        log, remark = sources.load(options)
        held_out = log.test if options.split == "test" else log.development
        if held_out is None:
            raise RequestError(
                f"there are no {options.split} rows: make their part of the log larger than none"
            )
        assert isinstance(log.train, Encoded)
        train = log.train if options.rows is None else drawn(log.train, options.rows)
        positives = int(held_out.labels.sum(dtype=np.int64))
        if not 0 < positives < len(held_out):
            self.metric, self.higher_is_better = "log_loss", False
            kind = "positive" if positives else "negative"
            self.about_metric = "Log loss is the mean cross entropy in nats: lower is better."
            remark = f"All {len(held_out):,} held-out rows are {kind}: AUC is undefined. {remark}"
        self.fingerprint = sources.fingerprint(train, held_out)
        mapped = train is log.train and log.hold == "disk"
        if options.rates:
            sizes = log.vocabulary.sizes
            self._rates = prior.fit(train, sizes)
            train = prior.beside(train, prior.out_of_fold(train, sizes, self._rates))
            held_out = prior.beside(held_out, self._rates.log_odds(held_out.ids))
        self._rows = Rows(train, mapped=mapped)
        self.train = self._rows
        self._held_out, self._last = held_out, None
        self._vocabulary = log.vocabulary
        self._time, self._label = log.schema.time, log.schema.label
        self.remark = remark.strip()

    def _ready(self) -> tuple[Rows, Encoded, Vocabulary]:
        if self._rows is None or self._held_out is None or self._vocabulary is None:
            raise RequestError("the clicks task has no data yet; call prepare(seed) first")
        return self._rows, self._held_out, self._vocabulary

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised ``ClickModel``; the global generators stay as they were.

        Its bias is that of the training rows' rate, so that the first steps need not find it; with
        ``rates``, those of the row begin with the weight 1 instead.
        """
        rows, _, vocabulary = self._ready()
        labels = rows.data.labels
        # one imagined row of each class, where there is none
        rate = smoothed(labels.sum(dtype=np.float64), np.float64(len(labels)), 0.5, 2.0)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed the accelerators' generators too.
            torch.default_generator.manual_seed(seed)
            model = ClickModel(
                self.options.model,
                vocabulary.sizes,
                rows.data.numeric.shape[1],
                self.options.shape(),
                sparse=self.options.sparse,
                log_odds=0.0 if self.options.rates else float(log_odds(rate)),
            )
        if self.options.rates:
            # they say themselves how many rows are positive
            assert model.numeric_linear is not None
            with torch.no_grad():
                model.numeric_linear.weight[0, -1] = 1.0
        return model

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) zeros: there is one domain."""
        return torch.zeros(len(index), dtype=torch.int64)

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """All rows in random order, by the generator's seed; see ``Rows.order``."""
        return self._ready()[0].order(generator)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The cross entropy of each row in nats, (B,) float32, and the log-odds (B,)."""
        found = model(batch["ids"], batch["numeric"])
        each = F.binary_cross_entropy_with_logits(
            found.float(), batch["labels"].float(), reduction="none"
        )
        return each, found

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """On held-out rows: AUC in percent, log loss, and what ``calibration`` gives.

        ``calibration``: predicted over observed positives, left out where none was observed;
        ``calibration_error``: the mean distance of the rates. Raises DivergedError for log-odds
        that are not finite.
        """
        values, labels = self._scored(model)
        by = calibration(values, labels)
        found = {"log_loss": log_loss(values, labels), "calibration_error": by.error}
        if labels.any():
            found["calibration"] = by.ratio
        if self.metric == "auc":
            found["auc"] = 100 * auc(values, labels)
        return {**found, f"{self.metric}/{DOMAIN}": found[self.metric]}

    def documents(self, model: nn.Module) -> dict[str, Tensor]:
        """Each positive held-out row's percentage of negative ones below it: (P,) float64.

        Their mean is the AUC. Resampling them takes positives for independent and leaves out
        what other negatives would change, which is little where these are many. Where the AUC is
        undefined: each row's loss.
        """
        values, labels = self._scored(model)
        if self.metric != "auc":
            each = F.binary_cross_entropy_with_logits(
                values.double(), labels.double(), reduction="none"
            )
            return {DOMAIN: each}
        return {DOMAIN: 100 * placements(values, labels)[0]}

    def _scored(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Log-odds (N,) float32 and labels (N,) of the held-out rows, on the CPU.

        Those of the last model asked for are kept: at the end of a run metrics, documents and page
        want the same ones.
        """
        _, held_out, _ = self._ready()
        # of the same values, and saying the same of the first rows: not only weights decide
        first = self._log_odds(model, held_out.rows(slice(0, self.options.eval_batch)))
        weights = _digest(model)
        if self._last is None or self._last[0] != weights or not self._last[1].equal(first):
            self._last = weights, first, self._log_odds(model, held_out)
        return self._last[2].clone(), torch.from_numpy(held_out.labels.astype(np.int64))

    def _log_odds(self, model: nn.Module, data: Encoded) -> Tensor:
        first = next(model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        found = torch.empty(len(data))
        size = self.options.eval_batch
        with evaluating(model):
            for start in range(0, len(data), size):
                part = slice(start, start + size)
                batch = {k: v.to(device) for k, v in tensors(data.rows(part)).items()}
                found[part] = self.losses(model, batch)[1].float().cpu()
        if not found.isfinite().all():
            raise DivergedError("the model's log-odds of held-out rows are not finite")
        return found

    def export(self, model: nn.Module, path: Path) -> None:
        """Write model, vocabulary and exported program as ``saved.read`` reads them."""
        from sparing.tasks.clicks import saved

        saved.write(model, path, self._ready()[2], self._label, self._rates)

    def load(self, path: Path) -> nn.Module:
        """The model that ``export`` wrote. Raises RequestError if it cannot be read."""
        from sparing.tasks.clicks import saved

        return saved.read(path).model.eval()

    def references(self) -> dict[str, dict[str, float]]:
        """AUC of smoothed target rates; {} where it is undefined. See ``reference``."""
        rows, held_out, vocabulary = self._ready()
        if self.metric != "auc":
            return {}
        return reference.references(rows.data, held_out, vocabulary.sizes, DOMAIN, self.fingerprint)

    def page(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """``tables`` of held-out rows, and ``also``: the further metrics to draw over the run."""
        _, held_out, _ = self._ready()
        values, labels = self._scored(model)
        shown: dict[str, Any] = {
            "tables": page.tables(values, labels, held_out.time, self._time),
            "also": {
                "log_loss": "log loss on held-out rows, in nats",
                "calibration": "predicted over observed positives",
            },
        }
        return shown | ({"remark": self.remark} if self.remark else {})

    def show(self, model: nn.Module, index: Sequence[int]) -> list[dict[str, str]]:
        """Training rows: {"text": their ids by field, "caption": label and predicted chance}."""
        rows, _, vocabulary = self._ready()
        if not len(index):
            return []
        data = rows.data.rows(np.asarray(list(index), dtype=np.int64))
        chance = self._log_odds(model, data).double().sigmoid().tolist()
        names = [field.name for field in vocabulary.fields]
        return [
            {
                "text": ", ".join(f"{n} {i}" for n, i in zip(names, ids, strict=True)),
                "caption": f"{label}, predicted {said:.3f}",
            }
            for ids, label, said in zip(
                data.ids.tolist(), data.labels.tolist(), chance, strict=True
            )
        ]

    def read(self, model: nn.Module, passage: dict[str, Any]) -> None:
        """There are no passages of text to read."""
        raise RequestError("the clicks task has no passages to read; look at its tables")


def _digest(model: nn.Module) -> str:
    """A hash of all parameters and buffers."""
    found = hashlib.sha1(usedforsecurity=False)
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        if isinstance(tensor, Tensor) and tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
