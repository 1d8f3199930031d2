"""What simple known methods reach on the same texts: words in, no network.

``naive Bayes``
    Multinomial naive Bayes over words, one imagined word of each kind added to each class
    (McCallum and Nigam 1998, A Comparison of Event Models for Naive Bayes Text Classification).
``most frequent class``
    The class that most training texts have, for every text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.tasks import figures
from sparing.tasks.figures import Scores
from sparing.tasks.text.sources import Labelled

_PROTOCOL = 1  # raise it whenever the figures would change for the same data
_WORD = re.compile(r"\w+|[^\w\s]")


def references(
    train: Labelled, held_out: Labelled, classes: tuple[str, ...], fingerprint: str
) -> Scores:
    """Accuracy in percent by method, then by class and ``"mean"``; kept in the user's cache."""
    name = f"text-{_PROTOCOL}"
    return figures.kept(
        name, fingerprint, {*classes, "mean"}, lambda: measure(train, held_out, classes)
    )


def measure(train: Labelled, held_out: Labelled, classes: tuple[str, ...]) -> Scores:
    """As ``references``, without the cache."""
    known, asked = words(train.texts, held_out.texts)
    found = {
        "naive Bayes": naive_bayes(known, train.labels, asked, len(classes)),
        "most frequent class": torch.bincount(train.labels).argmax().expand(len(held_out)),
    }
    table: Scores = {}
    for method, guess in found.items():
        right = 100 * (guess == held_out.labels).double()
        row = {
            name: float(right[held_out.labels == number].mean())
            for number, name in enumerate(classes)
        }
        table[method] = {**row, "mean": sum(row.values()) / len(row)}
    return table


def words(known: Sequence[str], asked: Sequence[str]) -> tuple[Tensor, Tensor]:
    """How often each text has each word, sparse (N, V) and (M, V) float32.

    Words are those of the ``known`` texts, in small letters; signs count as words.
    """
    numbers: dict[str, int] = {}
    for text in known:
        for word in _WORD.findall(text.casefold()):
            numbers.setdefault(word, len(numbers))
    return _counts(known, numbers), _counts(asked, numbers)


def _counts(texts: Sequence[str], numbers: dict[str, int]) -> Tensor:
    places = [
        (row, numbers[word])
        for row, text in enumerate(texts)
        for word in _WORD.findall(text.casefold())
        if word in numbers
    ]
    where = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).T
    shape = (len(texts), len(numbers))
    made = torch.sparse_coo_tensor(where, torch.ones(where.shape[1]), shape, check_invariants=True)
    return made.coalesce()


def naive_bayes(known: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """Counts known (N, V), labels (N,), asked (M, V) -> the likeliest class's number, (M,)."""
    member = F.one_hot(labels, classes).double()  # (N, classes)
    counts = torch.sparse.mm(known.double().T, member) + 1  # (V, classes)
    prior = member.mean(0).log()
    scores: Tensor = torch.sparse.mm(asked.double(), (counts / counts.sum(0)).log()) + prior
    return scores.argmax(1)
