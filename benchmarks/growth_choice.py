"""Choosing 10,000 of 1.28 million items by gain, beside numpy's and this library's other way.

    python benchmarks/growth_choice.py [--repetitions 15]

The draw alone, as ``Growth.choose`` makes it once the gains are known: exponential keys, a
partition, and the chance that each chosen item had. Beside it numpy's ``Generator.choice`` with
probabilities, one pick after the other as the released code of Info-Coevolution does it (ten picks,
told for 10,000), and torch's exponential keys of ``core.select.weighted_choice``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from record import in_turns, summary, write
from sparing.core.select import weighted_choice
from sparing.pool.choice import choose, generator

SIZE, PICKS = 1_281_167, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    random = generator(0)
    gains = random.gamma(2.0, 0.1, SIZE).astype(np.float32)
    dropped = gains.copy()
    dropped[random.random(SIZE) < 0.2] = np.nan
    other, own = np.random.default_rng(0), torch.Generator().manual_seed(0)
    wide = torch.from_numpy(gains)

    def by_numpy() -> Any:
        chance = gains.astype(np.float64)
        return other.choice(SIZE, PICKS, replace=False, p=chance / chance.sum())

    def one_by_one() -> None:
        left = gains.astype(np.float64)
        for _ in range(10):
            left[other.choice(SIZE, p=left / left.sum())] = 0

    times = in_turns(
        {
            "choose": lambda: choose(gains, PICKS, random),
            "choose, 20 % of the items dropped": lambda: choose(dropped, PICKS, random),
            "numpy's choice": by_numpy,
            "torch's keys": lambda: weighted_choice(wide, PICKS, own),
            "ten picks one by one": one_by_one,
        },
        repetitions=repetitions,
    )
    found = summary(times, "choose")
    results = {
        "items": SIZE,
        "picks": PICKS,
        "limit, seconds": 0.04,
        "times": found,
        "10,000 picks one by one, seconds": round(
            found["ten picks one by one"]["wall"]["median"] * PICKS / 10, 1
        ),
    }
    print({name: kinds["wall"]["median"] for name, kinds in found.items()})
    write("growth_choice", results, seeds=[0])


if __name__ == "__main__":
    main()
