"""What arms must share to be compared: task, data, evaluation, budget, and nothing by accident."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparing.core import registry
from sparing.core.errors import RequestError
from sparing.run.compare.found import Found

BUDGET = ("tokens", "epochs")
ANY = ("seed", "train.threads", "train.precision", "about", "name", "needs", "smoke")
"""Keys of a recipe in which the runs of one arm may differ."""


def require_same(
    arms: Mapping[str, Sequence[Found]], declared: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Check that finished runs can be compared; returns warnings.

    ``declared``: by arm the keys that it is meant to differ in, such as ``train.tokens``.

    Raises:
        RequestError: they differ in task, metric, data or evaluation, in a budget that no arm
            declares, a seed comes twice, or runs of one arm have different settings.
    """
    runs = [run for found in arms.values() for run in found if run.state == "finished"]
    if not runs:
        return []
    for found in arms.values():
        _require_one_setting([run for run in found if run.recipe])
    first = runs[0]
    for run in runs[1:]:
        for what, values in _shared(first, run):
            if values[0] != values[1]:
                raise _refused(first, run, what, *values)
        for key in BUDGET:
            ours, theirs = (r.recipe.get("train", {}).get(key) for r in (first, run))
            meant = any(f"train.{key}" in declared.get(r.arm, {}) for r in (first, run))
            if ours != theirs and not meant:
                raise _refused(first, run, f"budget (train.{key})", ours, theirs)
    return [*_codes(arms), *_precisions(runs), *_machines(runs), *_training(arms, declared)]


def _shared(one: Found, other: Found) -> Iterator[tuple[str, tuple[Any, Any]]]:
    pairs = (one.summary, other.summary)
    yield "task", (pairs[0].get("task"), pairs[1].get("task"))
    metrics = [s.get("metric", {}) for s in pairs]
    for key in ("name", "higher_is_better"):
        yield f"metric ({key})", (metrics[0].get(key), metrics[1].get(key))
    for option in _evaluation(str(one.summary.get("task"))):
        values = [run.recipe.get("task", {}).get(option) for run in (one, other)]
        if all(run.recipe for run in (one, other)):
            yield f"evaluation (task.{option})", (values[0], values[1])
    yield "data (the hash of the corpus)", (pairs[0].get("corpus"), pairs[1].get("corpus"))


def _evaluation(task: str) -> tuple[str, ...]:
    if task not in [record.name for record in registry.tasks()]:
        return ()
    return tuple(getattr(registry.task(task), "evaluation", ()))


def _refused(one: Found, other: Found, what: str, ours: Any, theirs: Any) -> RequestError:
    return RequestError(
        f'the arms "{one.arm}" and "{other.arm}" differ in {what}: {_told(ours)} in {one.path}, '
        f"{_told(theirs)} in {other.path}; compare runs that share it"
    )


def _told(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) >= 40 and " " not in text else text


def _require_one_setting(runs: Sequence[Found]) -> None:
    seeds: dict[int | None, Found] = {}
    for run in runs:
        if run.seed in seeds:
            raise RequestError(
                f'the arm "{run.arm}" has seed {run.seed} twice, in {seeds[run.seed].path} and '
                f"{run.path}; leave one out"
            )
        seeds[run.seed] = run
        key = first_difference(runs[0].recipe, run.recipe)
        if key:
            raise RequestError(
                f'the runs of the arm "{run.arm}" are not alike: {runs[0].path} and {run.path} '
                f"differ in {key}; give them as two arms"
            )


def first_difference(one: Any, other: Any, path: str = "", ignore: Sequence[str] = ANY) -> str:
    """The first key in which two recipes differ, "" if in none but those to ignore."""
    if path in ignore:
        return ""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            inner = f"{path}.{key}" if path else str(key)
            found = first_difference(one.get(key), other.get(key), inner, ignore)
            if found:
                return found
        return ""
    return "" if one == other else path or "everything"


def main_code(runs: Sequence[Found]) -> str:
    """The hash of the sources that made most of the runs, the later one of equals."""
    codes = [run.code for run in runs if run.code]
    return max(reversed(codes), key=codes.count) if codes else ""


def _codes(arms: Mapping[str, Sequence[Found]]) -> list[str]:
    runs = [run for found in arms.values() for run in found if run.state == "finished"]
    usual = main_code(runs)
    others = sorted({run.code for run in runs if run.code and run.code != usual})
    if not others:
        return []
    which = sorted({run.arm for run in runs if run.code in others})
    return [
        f"runs were made by different code: most by {usual[:12]}, of {', '.join(which)} some by "
        f"{', '.join(code[:12] for code in others)}; what changed between them may be a difference"
    ]


def _precisions(runs: Sequence[Found]) -> list[str]:
    found = {(r.summary.get("precision") or {}).get("chosen") for r in runs} - {None}
    if len(found) < 2:
        return []
    return [f"runs were made in different precisions: {', '.join(sorted(map(str, found)))}"]


def _training(
    arms: Mapping[str, Sequence[Found]], declared: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Differences in how arms train that none of them declares."""
    firsts = [run for found in arms.values() for run in found[:1] if run.recipe]
    told = []
    for run in firsts[1:]:
        meant = {key for name in (firsts[0].arm, run.arm) for key in declared.get(name, {})}
        ours, theirs = (r.recipe.get("train", {}) for r in (firsts[0], run))
        for key in ours:
            if f"train.{key}" in (*ANY, *meant) or key in BUDGET:
                continue
            if ours[key] != theirs.get(key):
                told.append(
                    f'"{firsts[0].arm}" and "{run.arm}" also differ in train.{key}: {ours[key]} '
                    f"and {theirs.get(key)}"
                )
    return told


def _machines(runs: Sequence[Found]) -> list[str]:
    told = []
    for key, name in (("device", "devices"), ("torch", "versions of torch")):
        found = {(r.summary.get("environment") or {}).get(key) for r in runs} - {None}
        if len(found) > 1:
            told.append(f"runs were made on different {name}: {', '.join(sorted(map(str, found)))}")
    return told
