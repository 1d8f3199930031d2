"""A quarter and a half of CIFAR-10, chosen by gain, against all of it and against chance.

    SPARING_DATA=... python benchmarks/growth_comparison.py --jobs 2 --threads 1 \\
        --set train.precision=fp32

    python benchmarks/growth_comparison.py --preset "" --record growth_sample --threads 1 \\
        --out runs/growth_sample --arms everything growth published random \\
        "random after cleaning" "growth without cleaning"

The arms of the recipe growth-vision on CIFAR-10 with 20 % copies and 20 % wrong labels that people
gave (CIFAR-10N), 3 seeds, judged on the untouched test images; the same as ``sparing compare
growth-vision --preset cifar10``. The first run makes the vectors of all images, which are kept in
the user's cache for the others. A run that is finished in --out is kept, an unfinished one is
resumed; --finished runs nothing and records what is there. Writes
benchmarks/records/growth_comparison.json. The second command is on the shipped sample, by pixels.
"""

from __future__ import annotations

from comparing import main

if __name__ == "__main__":
    main("growth-vision", record="growth_comparison", about=__doc__, preset="cifar10")
