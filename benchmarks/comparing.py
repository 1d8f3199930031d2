"""``sparing compare`` as a benchmark: it also writes a record into benchmarks/records."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import sparing
from sparing.run.compare.arms import Asked, slug
from sparing.run.compare.finished import judged
from sparing.run.compare.found import find
from sparing.run.compare.record import write
from sparing.run.compare.run import run_comparison
from sparing.run.recipe import load

RECORDS = Path(__file__).parent / "records"


def everything(
    out: Path, recipe: str, preset: str | None, baseline: str | None, margin: str | None
) -> sparing.Comparison:
    """All runs of the recipe's arms in ``out``, also if several calls made them, on other seeds."""
    declared = load(recipe, preset=preset)
    assert declared.compare is not None
    runs = {}
    for name in declared.arms:
        paths = sorted(path for path in (out / slug(name)).glob("seed-*") if path.is_dir())
        if paths:
            runs[name] = [find(path, name) for path in paths]
    seeds = sorted({int(run.seed or 0) for arm in runs.values() for run in arm})
    return judged(
        runs,
        baseline=baseline or declared.compare.baseline,
        margin=margin or declared.compare.margin,
        level=0.95,
        looks=1,
        declared={n: {"about": a.about, "set": a.set} for n, a in declared.arms.items()},
        about={"recipe": recipe, "preset": preset, "seeds": seeds, "command": command()},
    )


def command() -> str:
    """What was typed."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def main(recipe: str, *, record: str, about: str, preset: str | None = None) -> None:
    """Run what is missing of ``recipe``'s arms, then write ``record``, with options as below."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="*", help="only these; the record then has only these")
    parser.add_argument("--baseline")
    parser.add_argument("--margin")
    parser.add_argument("--budget", type=float, help="minutes")
    parser.add_argument("--preset", default=preset, help='"" for none')
    parser.add_argument("--looks", type=int, default=1)
    parser.add_argument("--finished", action="store_true", help="run nothing, record what is there")
    parser.add_argument(
        "--everything",
        action="store_true",
        help="as --finished, with all arms and seeds that are there, whichever call made them",
    )
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every arm")
    parser.add_argument("--out", type=Path, default=Path("runs") / record)
    parser.add_argument("--record", default=record)
    given = parser.parse_args()
    given.preset = given.preset or None
    if given.everything:
        found = everything(given.out, recipe, given.preset, given.baseline, given.margin)
    elif given.finished:
        found = sparing.compare(given.out, baseline=given.baseline, margin=given.margin)
        found.page(given.out / "compare.html")
    else:
        asked = Asked(
            recipe=recipe,
            out=given.out,
            seeds=given.seeds,
            arms=given.arms,
            baseline=given.baseline,
            margin=given.margin,
            budget=given.budget,
            jobs=given.jobs,
            threads=given.threads,
            preset=given.preset,
            overrides=tuple(given.set),
            looks=given.looks,
            command=command(),
        )
        found = run_comparison(asked, note=lambda text: print(text, file=sys.stderr))
    print(found)
    print(write(RECORDS / f"{given.record}.json", found))
