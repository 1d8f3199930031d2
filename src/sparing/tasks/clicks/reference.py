"""What simple known methods reach on the same rows: counts, no network.

``smoothed rates``
    Log-odds that add up over the fields that help, chosen greedily; see ``rates.additive``.
``rates of pairs``
    The rates of pairs of values of the two fields that help most, smoothed towards that.

Fields and the strength of the smoothing are chosen on a tenth of the training rows, drawn by lot
and left out of the counts meanwhile.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from sparing.tasks import figures
from sparing.tasks.clicks.auc import auc
from sparing.tasks.clicks.calibration import log_loss
from sparing.tasks.clicks.encoded import Encoded
from sparing.tasks.clicks.rates import Additive, Paired, additive, chosen, paired
from sparing.tasks.figures import Scores

_PROTOCOL = 1  # raise it whenever the figures would change for the same data
STRENGTHS: Final = (2.0, 8.0, 32.0, 128.0)
MOST: Final = 500_000
"""Rows to choose by."""


def references(
    train: Encoded, held_out: Encoded, sizes: tuple[int, ...], domain: str, fingerprint: str
) -> Scores:
    """AUC in percent by method, of the one domain and as ``"mean"``; kept in the user's cache."""
    name = f"clicks-{_PROTOCOL}"
    return figures.kept(
        name, fingerprint, {domain, "mean"}, lambda: measure(train, held_out, sizes, domain)
    )


def measure(train: Encoded, held_out: Encoded, sizes: tuple[int, ...], domain: str) -> Scores:
    """As ``references``, without the cache; {} where training rows are of one class."""
    labels = torch.from_numpy(held_out.labels.astype(np.float64))
    found = {}
    for name, model in fitted(train, sizes).items():
        value = 100 * auc(torch.from_numpy(model.log_odds(held_out.ids)), labels)
        found[name] = {domain: value, "mean": value}
    return found


def fitted(train: Encoded, sizes: tuple[int, ...]) -> dict[str, Additive | Paired]:
    """The models, fitted to all training rows; {} where these are of one class."""
    if not 0 < int(train.labels.sum(dtype=np.int64)) < len(train):
        return {}
    lot = np.random.default_rng(0).permutation(len(train))
    asked, known = lot[: min(len(train) // 10, MOST)], lot[len(train) // 10 :]
    kept, held = train.rows(np.sort(known)), train.rows(np.sort(asked))
    some = 0 < int(held.labels.sum(dtype=np.int64)) < len(held)
    if not some or not 0 < int(kept.labels.sum(dtype=np.int64)) < len(kept):
        whole = additive(train.ids, train.labels, sizes, tuple(range(len(sizes))))
        return {"smoothed rates": whole}
    truth = torch.from_numpy(held.labels.astype(np.float64))

    def loss(model: Additive | Paired) -> float:
        values: Tensor = torch.from_numpy(model.log_odds(held.ids))
        return log_loss(values, truth)

    tried = []
    for strength in STRENGTHS:
        fields = chosen(kept.ids, kept.labels, held.ids, held.labels, sizes, strength)
        model = additive(kept.ids, kept.labels, sizes, fields, strength)
        tried.append((loss(model), strength, fields, model))
    _, strength, fields, below = min(tried, key=lambda one: one[0])
    whole = additive(train.ids, train.labels, sizes, fields, strength)
    found: dict[str, Additive | Paired] = {"smoothed rates": whole}
    if len(fields) > 1:
        pair = fields[0], fields[1]
        losses = {s: loss(paired(kept.ids, kept.labels, sizes, below, pair, s)) for s in STRENGTHS}
        best = min(losses, key=lambda s: losses[s])
        found["rates of pairs"] = paired(train.ids, train.labels, sizes, whole, pair, best)
    return found
