"""The arms of the language recipe against its baseline, and the record of it.

    python benchmarks/language_comparison.py --jobs 2 --threads 1

The same as ``sparing compare language-dynmoe``; the arms are in the recipe. A run that is finished
in --out is kept, an unfinished one is resumed; --finished runs nothing and records what is there.
Writes benchmarks/records/language_comparison.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import sparing
from sparing.run.compare.arms import Asked
from sparing.run.compare.record import write
from sparing.run.compare.run import run_comparison

RECIPE = "language-dynmoe"
RECORDS = Path(__file__).parent / "records"


def main() -> None:
    """Run what is missing, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="*", help="only these; the record then has only these")
    parser.add_argument("--baseline")
    parser.add_argument("--margin")
    parser.add_argument("--budget", type=float, help="minutes")
    parser.add_argument("--preset")
    parser.add_argument("--looks", type=int, default=1)
    parser.add_argument("--finished", action="store_true", help="run nothing, record what is there")
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every arm")
    parser.add_argument("--out", type=Path, default=Path("runs/language_comparison"))
    parser.add_argument("--record", default="language_comparison")
    given = parser.parse_args()
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    if given.finished:
        found = sparing.compare(given.out, baseline=given.baseline, margin=given.margin)
        found.page(given.out / "compare.html")
    else:
        asked = Asked(
            recipe=RECIPE,
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
            command=command,
        )
        found = run_comparison(asked, note=lambda text: print(text, file=sys.stderr))
    print(found)
    print(write(RECORDS / f"{given.record}.json", found))


if __name__ == "__main__":
    main()
