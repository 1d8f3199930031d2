"""Large batches on the retail promotion log: the clip, its schedule, and other rules.

    python benchmarks/clicks_stages.py --stage 1 --jobs 2
    python benchmarks/clicks_stages.py --stage 2 --jobs 2

Stage 1: 4 million rows, weeks 45 to 48. The rates of batch 1,024 are chosen from a grid; from them
follow those of 8,192 and 65,536 by every rule, all with the same schedule and the clip off; the
schedule of CowClip also with the clip, as published and with ratio and bound by powers of ten
lower, down to where nearly all rows are clipped. What is best is in the record, and
stage 2 reads it there.

Stage 2: all rows, two epochs, weeks 49 to 53: 1,024, and both large batches with CowClip, with the
clip off and with the best other rule, three seeds; with the best of the lower bounds too, where it
was better than none on the development weeks; 131,072 once. Differences are paired by seed and
week (see weekly.py); curves give the AUC by rows and by steps.

A run is one of ``sparing compare`` on the recipe clicks-journey, with arms made here. Large batches
are accumulated from micro-batches of 8,192. Finished runs are kept, unfinished ones resumed, and
the record benchmarks/records/clicks_stage1.json, or 2, is written anew whenever a run ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from record import RECORDS, write
from sparing.run.compare.arms import Asked, slug
from sparing.run.compare.found import Found, find
from sparing.run.compare.run import run_comparison
from sparing.tasks.clicks.promotions import promotions
from weekly import best, by_week, difference, mean, whose

BASE, LARGE, HUGE, MICRO = 1024, (8192, 65_536), 131_072, 8192
RATES = (5e-4, 1e-3, 2e-3)
LOWER = range(1, 7)
"""Powers of ten that ratio and bound are divided by."""
RULES = {"none": (0.0, 0.0), "sqrt": (0.5, 0.5), "linear": (1.0, 1.0), "clip off": (0.5, 0.0)}
"""Powers of the batch's factor: rate of dense layers, rate of tables. "clip off" is CowClip's."""
RATIO, BOUND = 1.0, 1e-5
Arms = dict[str, dict[str, Any]]


def arm(batch: int, lr: float, tables: float, clip: float | None = None) -> dict[str, Any]:
    """Overrides of the recipe; ``clip``: what ratio and bound are divided by, None for none."""
    return {
        "train.batch_size": min(batch, MICRO),
        "train.accumulate": max(1, batch // MICRO),
        "train.learning_rate": float(f"{lr:.4g}"),
        "methods.cowclip.table_lr": float(f"{tables:.4g}"),
        "methods.cowclip.ratio": "inf" if clip is None else RATIO / clip,
        "methods.cowclip.bound": BOUND if clip is None else BOUND / clip,
    }


def ruled(name: str, batch: int, lr: float, tables: float, clip: float | None = None) -> Any:
    """The arm of a rule of ``RULES`` at a batch, from the rates of ``BASE``."""
    dense, table = ((batch / BASE) ** power for power in RULES[name])
    return arm(batch, lr * dense, tables * table, clip)


class Stage:
    """Arms, their runs in a directory, and the record of all that are there."""

    def __init__(self, given: argparse.Namespace, name: str) -> None:
        self.given, self.name = given, name
        self.out: Path = given.out / f"stage-{given.stage}"
        self.split = "development" if given.stage == 1 else "test"
        self.arms: Arms = {}
        self.results: dict[str, Any] = {}
        log = promotions()
        held = log.development if given.stage == 1 else log.test
        assert held is not None
        self.week = np.asarray(held.time)[np.asarray(held.labels) > 0]

    def run(self, group: str, arms: Arms, seeds: int) -> None:
        """Make what is missing of these arms, seed by seed; names are of the whole stage."""
        self.arms |= arms
        given = self.given
        recipe = yaml.safe_load(
            resources.files("sparing.recipes").joinpath("clicks-journey.yaml").read_text()
        )
        recipe["arms"] = {name: {"set": changes} for name, changes in arms.items()}
        recipe["compare"] = {"baseline": next(iter(arms)), "margin": "+-0.1 auc", "random": False}
        recipe["task"] |= {"split": self.split}
        if given.rows:
            recipe["task"]["rows"] = given.rows
        recipe["train"]["epochs"] = given.epochs or given.stage
        recipe["watch"] = {"evaluate": 1.0 if given.stage == 1 else 0.125, "log": 0.01}
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"{group}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        for count in range(1, seeds + 1):
            asked = Asked(
                recipe=str(file),
                out=self.out / group,
                seeds=count,
                jobs=given.jobs,
                threads=1,
                overrides=tuple(given.set),
            )
            if not given.finished:
                run_comparison(asked, note=self.noted)
        self.write()

    def noted(self, text: str) -> None:
        """Tell of a run, and write the record if it has ended."""
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
        if not text.endswith("started"):
            self.write()

    def runs(self, name: str) -> dict[int, Found]:
        """Those of an arm that have ended well, by seed."""
        paths = sorted(self.out.glob(f"*/{slug(name)}/seed-*/"))
        found = [find(path, name) for path in paths]
        return {int(run.seed or 0): run for run in found if run.state == "finished"}

    def weeks(self, name: str) -> dict[int, np.ndarray]:
        """By seed, (W,): see ``weekly``."""
        tables = {}
        for seed, run in self.runs(name).items():
            (placements,) = run.documents().values()
            tables[seed] = by_week(placements, self.week)
        return tables

    def auc(self, name: str) -> float:
        """The mean over seeds; minus infinity where none has ended well."""
        return mean([run.value for run in self.runs(name).values()])

    def against(self, name: str, other: str) -> dict[str, Any] | None:
        """The difference of two arms, and which they are."""
        found = difference(self.weeks(name), self.weeks(other))
        return None if found is None else {"arm": name, "less": other, **found}

    def told(self, name: str) -> dict[str, Any]:
        """All that is known of an arm."""
        each = {}
        for seed, run in self.runs(name).items():
            signals = run.summary["methods"].get("cowclip", {})
            each[seed] = {
                "auc": round(run.value, 4),
                "log_loss": round(run.summary["metrics"]["log_loss"], 6),
                "share of present rows clipped": round(signals.get("clipped_so_far", 0.0), 6),
                "steps": run.summary["steps"],
                "row updates": run.cost("row_updates"),
                "seconds": run.cost("seconds"),
                "curve": curve(run.path),
            }
        return {"set": self.arms[name], "seeds": each}

    def write(self) -> None:
        """The record of what there is now."""
        results = {"arms": {name: self.told(name) for name in self.arms}, **self.results}
        note = f"AUC in percent on the {self.split} weeks; seconds are of a run with one thread."
        write(self.name, results, seeds=range(self.given.seeds), note=note)


def curve(path: Path) -> list[list[float]]:
    """Each evaluation of a run: rows, steps, AUC."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = [x for x in lines if x["kind"] == "eval" and "auc" in x]
    return [[x["tokens"], x["step"], round(x["auc"], 4)] for x in found]


def first(given: argparse.Namespace) -> None:
    """Stage 1."""
    stage = Stage(given, given.record or "clicks_stage1")
    grid = {
        f"1024 at {lr:g} and {tables:g}": arm(BASE, lr, tables) for lr in RATES for tables in RATES
    }
    stage.run("grid", grid, 1)
    chosen = best({name: stage.auc(name) for name in grid})
    lr, tables = (grid[chosen][key] for key in ("train.learning_rate", "methods.cowclip.table_lr"))
    stage.results["chosen"] = {"lr": lr, "table_lr": tables}
    rules: Arms = {}
    lowered: Arms = {}
    for batch in LARGE:
        rules |= {f"{batch} {name}": ruled(name, batch, lr, tables) for name in RULES}
        rules[f"{batch} cowclip"] = ruled("clip off", batch, lr, tables, 1.0)
        lowered |= {
            f"{batch} cowclip / 1e{k}": ruled("clip off", batch, lr, tables, 10.0**k) for k in LOWER
        }
    stage.run("rules", rules, min(2, given.seeds))
    stage.run("bounds", lowered, 1)
    for batch in LARGE:
        others = {name: stage.auc(f"{batch} {name}") for name in RULES if name != "clip off"}
        other = best(others)
        clip, off = f"{batch} cowclip", f"{batch} clip off"
        one = {k: stage.runs(f"{clip} / 1e{k}").get(0) for k in LOWER}
        none = stage.runs(off).get(0)
        better = {
            str(k): run.value for k, run in one.items() if run and none and run.value > none.value
        }
        found = [stage.against(clip, off), stage.against(off, f"{batch} {other}")]
        stage.results["chosen"][str(batch)] = {
            "other": other,
            "lower": int(best(better)) if better else None,
        }
        stage.results[f"differences at {batch}"] = [
            *found,
            *(stage.against(f"{clip} / 1e{k}", off) for k in LOWER),
        ]
        stage.results[f"what the data say at {batch}"] = whose(*found)
    stage.write()


def second(given: argparse.Namespace) -> None:
    """Stage 2."""
    file = RECORDS / f"{given.chosen}.json"
    chosen = json.loads(file.read_text())["results"]["chosen"]
    lr, tables = chosen["lr"], chosen["table_lr"]
    stage = Stage(given, given.record or "clicks_stage2")
    arms: Arms = {"1024": arm(BASE, lr, tables)}
    for batch in LARGE:
        other, lower = chosen[str(batch)]["other"], chosen[str(batch)]["lower"]
        arms[f"{batch} cowclip"] = ruled("clip off", batch, lr, tables, 1.0)
        arms[f"{batch} clip off"] = ruled("clip off", batch, lr, tables)
        arms[f"{batch} {other}"] = ruled(other, batch, lr, tables)
        if lower:
            arms[f"{batch} cowclip / 1e{lower}"] = ruled("clip off", batch, lr, tables, 10.0**lower)
    stage.run("arms", arms, given.seeds)
    huge = {f"{HUGE} cowclip": ruled("clip off", HUGE, lr, tables, 1.0)}
    for batch in LARGE:
        other, lower = chosen[str(batch)]["other"], chosen[str(batch)]["lower"]
        clip, off = f"{batch} cowclip", f"{batch} clip off"
        found = [stage.against(clip, off), stage.against(off, f"{batch} {other}")]
        more = [stage.against(f"{clip} / 1e{lower}", off)] if lower else []
        small = [stage.against(name, "1024") for name in arms if name.startswith(f"{batch} ")]
        stage.results[f"differences at {batch}"] = [*found, *more, *small]
        stage.results[f"what the data say at {batch}"] = whose(*found)
    stage.run("huge", huge, 1)


def main() -> None:
    """Run what is missing of a stage, and write its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="to train on; 4 million, or all")
    parser.add_argument("--epochs", type=int, help="1, or 2")
    parser.add_argument("--out", type=Path, default=Path("runs/clicks"))
    parser.add_argument("--record", help="name of the record")
    parser.add_argument("--chosen", default="clicks_stage1", help="record that stage 2 reads")
    parser.add_argument("--finished", action="store_true", help="run nothing, record what is there")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every run")
    given = parser.parse_args()
    if given.stage == 1 and given.rows is None:
        given.rows = 4_000_000
    (first if given.stage == 1 else second)(given)


if __name__ == "__main__":
    main()
