"""The arms of the text recipe on AG News with MiniLM against full fine-tuning, and its record.

    SPARING_DATA=... python benchmarks/adapters_comparison.py --jobs 2 --threads 1

The same as ``sparing compare adapters-text --preset agnews``; the arms are in the recipe. A run
that is finished in --out is kept, an unfinished one is resumed; --everything runs nothing and
records what is there. Writes benchmarks/records/adapters_comparison.json. The claims that
adapters_claims.py checks are read from the same runs.
"""

from __future__ import annotations

from comparing import main

if __name__ == "__main__":
    main("adapters-text", record="adapters_comparison", about=__doc__, preset="agnews")
