"""The arms of the vision recipe on all of Fashion-MNIST against full training, and its record.

    python benchmarks/vision_comparison.py --jobs 2 --threads 1 --set train.precision=fp32
    python benchmarks/vision_comparison.py --preset cifar10 --out runs/cifar10 --record cifar10

The same as ``sparing compare vision-infobatch --preset fashion-mnist``; the arms are in the recipe.
A run that is finished in --out is kept, an unfinished one is resumed; --finished runs nothing and
records what is there. Writes benchmarks/records/vision_comparison.json.
"""

from __future__ import annotations

from comparing import main

if __name__ == "__main__":
    main("vision-infobatch", record="vision_comparison", about=__doc__, preset="fashion-mnist")
