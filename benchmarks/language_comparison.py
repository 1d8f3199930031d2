"""The arms of the language recipe against its baseline, and the record of it.

    python benchmarks/language_comparison.py --jobs 2 --threads 1

The same as ``sparing compare language-dynmoe``; the arms are in the recipe. A run that is finished
in --out is kept, an unfinished one is resumed; --finished runs nothing and records what is there.
Writes benchmarks/records/language_comparison.json.
"""

from __future__ import annotations

from comparing import main

if __name__ == "__main__":
    main("language-dynmoe", record="language_comparison", about=__doc__)
