"""The arms of the instruction recipe against uniform mixing, and the record of it.

    python benchmarks/instruct_comparison.py --jobs 2 --threads 1
    python benchmarks/instruct_comparison.py --preset t0 --record instruct_comparison_t0 \
        --out runs/instruct_t0

The same as ``sparing compare instruct-mix``; the arms are in the recipe. The preset t0 takes T0's
templates in eight sources from $SPARING_DATA. A finished run in --out is kept, an unfinished one is
resumed; --finished runs nothing and records what is there.
"""

from __future__ import annotations

from comparing import main

if __name__ == "__main__":
    main("instruct-mix", record="instruct_comparison", about=__doc__)
