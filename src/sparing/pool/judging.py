"""Decisions that need the whole pool: labels that are likely wrong, and items far from all."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sparing.core.errors import RequestError, unknown
from sparing.pool.decisions import Decision, decide
from sparing.pool.items import UNLABELLED
from sparing.pool.label_issues import (
    by_neighbours,
    by_regression,
    judged_classes,
    label_issues,
)
from sparing.pool.members import STANDS, Members
from sparing.pool.outliers import outliers

BY: Final = ("neighbours", "regression")


def find(reason: str, store: Any, members: Members, **options: Any) -> Decision:
    """The decision about the items in the choice, by their neighbours; it changes nothing.

    options: of "label issue" ``rule`` of ``label_issues``, and ``by``, what tells a class from
    vectors: "neighbours", or "regression", cross-validated; of "outlier" ``factor`` of
    ``outliers``. Raises RequestError where no item has a label to judge.
    """
    kinds: dict[str, Callable[..., Decision]] = {"label issue": _labels, "outlier": _outliers}
    if reason not in kinds:
        raise unknown("decision", reason, kinds)
    known = list(signature(kinds[reason]).parameters)[2:]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    return kinds[reason](store, members, **options)


def _labels(
    store: Any, members: Members, *, rule: str = "prune_by_noise_rate", by: str = "neighbours"
) -> Decision:
    if by not in BY:
        raise unknown("way to tell classes", by, BY)
    here = members.role == STANDS
    labels = np.where(here, store.column("label"), UNLABELLED)
    classes = judged_classes(labels)
    if not classes.size:
        raise RequestError(
            "no class has enough labelled items to judge labels by; give labels with the items"
        )
    table = members.main.table
    if by == "neighbours":
        chance = by_neighbours(labels, table.distances, table.who, classes)
        told = f"{table.keep} neighbours"
    else:
        near = members.main.index.vectors(members.ids[here])
        rows = np.zeros((here.size, near.shape[1]), np.float32)
        rows[here] = near
        chance = by_regression(labels, rows, classes)
        told = "logistic regression"
    found = label_issues(labels, chance, classes, rule=rule)
    return decide(
        "label issue",
        members.ids,
        store.column("reason"),
        found.issues & here,
        detail=found.detail or f"confident learning from {told}, {rule}",
        scores=1 - np.nan_to_num(found.quality, nan=1.0),
        words="label {given} has probability 1 - {score:.3f}, and {likelier} is likelier",
        told={"given": labels, "likelier": found.likelier},
    )


def _outliers(store: Any, members: Members, *, factor: float = 6.0) -> Decision:
    here = members.role == STANDS
    distances: NDArray[Any] = np.full((here.size, members.main.table.keep), np.inf, np.float32)
    distances[here] = members.main.table.distances[here]
    found = outliers(distances, factor=factor)
    return decide(
        "outlier",
        members.ids,
        store.column("reason"),
        found.outliers & here,
        detail=f"mean distance to {members.main.table.keep} neighbours above {found.threshold:.3f}",
        scores=np.nan_to_num(found.scores, nan=0.0),
        words="mean distance {score:.3f}",
    )
