"""The arms of a comparison as rows of tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sparing.run.report import words
from sparing.run.report.scatter import style

if TYPE_CHECKING:
    from sparing.run.compare.finished import Comparison
    from sparing.run.compare.statistics import Judgement


def differences(comparison: Comparison) -> list[dict[str, Any]]:
    """Each arm's difference from the baseline with its interval, drawn beside the margin."""
    judged = [arm for arm in comparison.arms if arm.judgement and arm.name != comparison.baseline]
    reach = _reach([arm.judgement for arm in judged if arm.judgement], comparison)
    found = []
    for number, arm in enumerate(comparison.arms, start=1):
        if arm.name == comparison.baseline:
            continue
        row: dict[str, Any] = {"number": number, "name": arm.name, "style": style(number)}
        judgement = arm.judgement
        row["verdict"] = (judgement.verdict if judgement else None) or "no verdict"
        row["why"] = judgement.why if judgement else "no run of it is finished"
        row["notes"] = judgement.notes if judgement else []
        row["needed"] = judgement.seeds_needed if judgement else None
        row["intervals"] = []
        row["drawn"] = None
        if judgement:
            for name, interval in (
                ("paired", judgement.paired),
                ("unpaired", judgement.unpaired),
                ("bootstrap, seeds", judgement.bootstrap),
                ("bootstrap, seeds and documents", judgement.documents),
            ):
                if interval is not None:
                    row["intervals"].append((name, _signed(interval.estimate), _range(interval)))
            row["level"] = f"{100 * (1 - judgement.alpha):g}"
            row["n"] = judgement.n
            if judgement.paired is not None:
                bounds = comparison.margin.bounds(judgement.mean_baseline)
                row["drawn"] = _drawn(judgement.paired, bounds, reach)
        found.append(row)
    return found


def _reach(judgements: list[Judgement], comparison: Comparison) -> float:
    """How far the strips go: over all intervals, but at most six margins and at least two."""
    sizes, ends = [0.0], [0.0]
    for judgement in judgements:
        bounds = comparison.margin.bounds(judgement.mean_baseline)
        sizes += [abs(bound) for bound in bounds if abs(bound) < float("inf")]
        if judgement.paired is not None:
            ends += [abs(judgement.paired.low), abs(judgement.paired.high)]
    return max(2.2 * max(sizes), min(6 * max(sizes), 1.1 * max(ends))) or 1.0


def _drawn(interval: Any, margin: tuple[float, float], reach: float) -> dict[str, float | bool]:
    """Percentages of a strip that goes from -reach to +reach; what is beyond is cut off."""

    def at(value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value + reach) / (2 * reach))), 2)

    return {
        "low": at(interval.low),
        "width": round(at(interval.high) - at(interval.low), 2),
        "estimate": min(98.0, max(2.0, at(interval.estimate))),
        "margin": at(margin[0]),
        "margin_width": round(at(margin[1]) - at(margin[0]), 2),
        "left": interval.low < -reach,
        "right": interval.high > reach,
    }


def seeds_of(comparison: Comparison) -> list[int | None]:
    """Every seed that a run has, in order; first None, where a run tells none."""
    found = {run.seed for arm in comparison.arms for run in arm.runs}
    return sorted(found, key=lambda seed: -1 if seed is None else seed)


def rows(comparison: Comparison, place: Path) -> list[dict[str, Any]]:
    """Every arm with the metric of every seed, marked where something is not as usual.

    A run whose page lies below the directory ``place``, where this page goes, is linked to it.
    """
    usual = comparison.code
    seeds = seeds_of(comparison)
    whole = next(
        (arm.costs.get("seconds") for arm in comparison.arms if arm.name == comparison.baseline),
        None,
    )
    found = []
    for number, arm in enumerate(comparison.arms, start=1):
        by_seed = {run.seed: run for run in arm.runs}
        cells = []
        for seed in seeds:
            run = by_seed.get(seed)
            if run is None:
                cells.append({"text": words.DASH, "title": "not asked for", "state": "none"})
            elif run.state == "finished":
                other = bool(run.code) and run.code != usual
                cells.append(
                    {
                        "text": f"{run.value:.3f}" + "†" * other,
                        "title": f"made by other code, {run.code[:12]}" if other else "",
                        "state": "other" if other else "finished",
                        "page": _link(run.path / "report.html", place),
                    }
                )
            else:
                cells.append({"text": run.state, "title": run.why, "state": run.state})
        costs = arm.costs
        found.append(
            {
                "number": number,
                "name": arm.name,
                "style": style(number),
                "baseline": arm.name == comparison.baseline,
                "about": str(arm.declared.get("about") or ""),
                "mean": words.DASH if arm.mean is None else f"{arm.mean:.4f}",
                "cells": cells,
                "flops": words.amount(costs["flops"], "flops") if "flops" in costs else words.DASH,
                "time": words.duration(costs["seconds"]) if "seconds" in costs else words.DASH,
                "speed": f"{whole / costs['seconds']:.2f}x"
                if whole and costs.get("seconds")
                else words.DASH,
                "parameters": words.count(costs["parameters"])
                if "parameters" in costs
                else words.DASH,
            }
        )
    return found


def _link(page: Path, place: Path) -> str:
    """The way from ``place`` down to ``page``, "" if there is none: pages are moved together."""
    page, place = page.resolve(), place.resolve()
    if not page.is_relative_to(place) or not page.is_file():
        return ""
    return quote(page.relative_to(place).as_posix())


def settings(comparison: Comparison) -> list[dict[str, Any]]:
    """What makes each arm: its overrides, what was matched and how its settings were chosen."""
    found = []
    for number, arm in enumerate(comparison.arms, start=1):
        held = arm.declared
        match, tuning = held.get("match") or {}, held.get("tuning") or {}
        told = [f"{key}: {_plain(value)}" for key, value in (held.get("set") or {}).items()]
        told += [f"{key}: {_plain(value)}, settled by runs"
                 for key, value in (held.get("settled") or {}).items()]  # fmt: skip
        if "target" in match:
            spent = arm.costs.get(match["unit"])
            told.append(
                f"{match['key']} solved so that {match['unit']} are those of {match['to']}: "
                f"{match['target']:.4g} wanted, {match['planned']:.4g} planned"
                + (f", {spent:.4g} spent" if spent is not None else "")
            )
        if tuning:
            tried = "; ".join(
                f"{_plain(t['set'])} {'diverged' if t['value'] is None else round(t['value'], 4)}"
                for t in tuning["tried"]
            )
            chosen = _plain(tuning["chosen"]) or "the recipe's own"
            told.append(f"chosen with seed {tuning['seed']}: {chosen}, of {tried}")
            if tuning.get("note"):
                told.append(tuning["note"])
        found.append(
            {
                "number": number,
                "name": arm.name,
                "style": style(number),
                "told": told or ["the recipe as it is"],
                "command": str(held.get("command") or ""),
            }
        )
    return found


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", words.MINUS)


def _range(interval: Any) -> str:
    return f"{_signed(interval.low)} to {_signed(interval.high)}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.rpartition('.')[2]} {_plain(v)}" for key, v in value.items())
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
