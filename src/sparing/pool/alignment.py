"""Do image and text belong together? The threshold is calibrated on pairs that surely do not.

A fixed cosine (the released rule has 0.4) fits one encoder; another would drop nearly everything at
it. Here the texts are shuffled among the images, and the threshold is a quantile of what such pairs
reach, so that a stated share of wrong pairs would be kept (Qin et al. 2024, section 3.1, has the
step, arXiv 2405.18347; the calibration is ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.pool.items import Vectors

LEAST: Final = 64
"""Fewer pairs say too little of a quantile: nothing is judged until there are so many."""
_SHIFTS: Final = 32
_TELLING: Final = 0.6
"""The least chance of a true pair to exceed a wrong one for the encoder to be believed."""
_ALIKE: Final = 0.98


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """threshold: the least cosine of a pair that is kept, -inf where nothing can be judged.

    false_keep: the share of wrong pairs that reach it; kept: the share of the given pairs that do;
    telling: the chance that a given pair exceeds a wrong one, 0.5 for an encoder that cannot tell;
    pairs: how many it was calibrated on; detail: why nothing is judged, else "".
    """

    threshold: float
    false_keep: float
    kept: float
    telling: float
    pairs: int
    detail: str = ""


def cosines(vectors: Vectors) -> NDArray[np.float32]:
    """(n,) of each item's image and text. Raises RequestError where there are no texts."""
    if vectors.second is None:
        raise RequestError(
            "alignment needs vectors of images and of their texts; take an encoder of both, such "
            "as the folder of a CLIP model"
        )
    found: NDArray[np.float32] = np.einsum("nd,nd->n", vectors.main, vectors.second)
    return found


def calibrate(vectors: Vectors, *, false_keep: float = 0.01, seed: int = 0) -> Calibration:
    """The threshold that ``false_keep`` of the pairs of an image with another's text reach.

    Texts that are nearly the image's own (several copies of a caption) make no wrong pair and are
    left out. With fewer than LEAST pairs, or where given pairs hardly exceed wrong ones, the
    threshold is -inf and ``detail`` says why: an encoder that cannot tell must not drop anything.
    """
    require_number("false_keep", false_keep, 1e-6, 0.5)
    own = cosines(vectors)
    assert vectors.second is not None
    size = len(own)
    if size < LEAST:
        return _silent(size, f"{size} pairs are too few to calibrate on; {LEAST} are needed")
    drawn = np.random.Generator(np.random.Philox(seed))
    # each shift pairs every image with another's text; a random order makes shifts random pairs
    order = drawn.permutation(size)
    main, second = vectors.main[order], vectors.second[order]
    steps = drawn.permutation(np.arange(1, size))[:_SHIFTS]
    wrong = []
    for step in steps.tolist():
        other = np.roll(second, step, axis=0)
        distinct = np.einsum("nd,nd->n", second, other) < _ALIKE
        wrong.append(np.einsum("nd,nd->n", main, other)[distinct])
    null = np.sort(np.concatenate(wrong).astype(np.float64))
    if len(null) < max(LEAST, 5 / false_keep):
        return _silent(size, f"{len(null)} wrong pairs can be made; the texts are nearly all alike")
    # the least value that at most this share reaches
    at = min(len(null) - 1, int(np.ceil(len(null) * (1 - false_keep))))
    threshold = float(null[at])
    below = (np.searchsorted(null, own, "left") + np.searchsorted(null, own, "right")) / 2
    telling = float(below.mean() / len(null))
    if telling < _TELLING:
        detail = (
            f"the encoder cannot tell: a pair exceeds a shuffled one with chance {telling:.2f} "
            "only, so nothing was dropped as misaligned; take another encoder"
        )
        return _silent(size, detail, telling)
    return Calibration(
        threshold=threshold,
        false_keep=float((null >= threshold).mean()),
        kept=float((own >= threshold).mean()),
        telling=telling,
        pairs=size,
    )


def _silent(size: int, detail: str, telling: float = float("nan")) -> Calibration:
    return Calibration(
        threshold=-np.inf, false_keep=1.0, kept=1.0, telling=telling, pairs=size, detail=detail
    )


@final
class Alignment:
    """The same for a stream: a bounded sample of the pairs seen calibrates the threshold.

    A pair is taken into the sample with equal chance whenever it came (Vitter 1985, algorithm R,
    by batches). The threshold moves as the sample grows; ``calibration`` is the latest.
    """

    def __init__(self, *, false_keep: float = 0.01, sample: int = 4096, seed: int = 0) -> None:
        require_number("false_keep", false_keep, 1e-6, 0.5)
        require_whole("sample", sample, LEAST)
        self.false_keep, self.sample, self.seed = false_keep, sample, seed
        self.seen = 0
        self._random = np.random.Generator(np.random.Philox(seed))
        self._main: NDArray[np.float32] | None = None
        self._second: NDArray[np.float32] | None = None
        self._calibrated_at = 0
        self.calibration = _silent(0, f"fewer than {LEAST} pairs were seen")

    def observe_(self, vectors: Vectors) -> Calibration:
        """Take in a batch of pairs; the threshold is made anew whenever a quarter more was seen."""
        cosines(vectors)  # raises where there are no texts
        assert vectors.second is not None
        if self._main is None or self._second is None:
            self._main, self._second = vectors.main[:0], vectors.second[:0]
        room = max(0, self.sample - len(self._main))
        self._main = np.concatenate([self._main, vectors.main[:room]])
        self._second = np.concatenate([self._second, vectors.second[:room]])
        count = len(vectors.main)
        late = np.arange(min(room, count), count)
        place = (self._random.random(len(late)) * (self.seen + late + 1)).astype(np.int64)
        hit = place < self.sample
        self._main[place[hit]] = vectors.main[late[hit]]
        self._second[place[hit]] = vectors.second[late[hit]]
        self.seen += count
        if self.seen >= max(LEAST, 1.25 * self._calibrated_at):
            held = Vectors(main=self._main, second=self._second)
            self.calibration = calibrate(held, false_keep=self.false_keep, seed=self.seed)
            self._calibrated_at = self.seen
        return self.calibration

    def misaligned(self, vectors: Vectors) -> NDArray[np.bool_]:
        """(n,) which pairs lie below the threshold as it is now."""
        return cosines(vectors) < self.calibration.threshold

    def state(self) -> dict[str, Any]:
        """What ``load`` takes: the sample and the counts."""
        return {
            "main": self._main,
            "second": self._second,
            "seen": self.seen,
            "calibrated_at": self._calibrated_at,
            "random": self._random.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``."""
        self._main, self._second = state["main"], state["second"]
        self.seen, self._calibrated_at = int(state["seen"]), int(state["calibrated_at"])
        self._random.bit_generator.state = state["random"]
        if self._main is not None and self._second is not None and self._calibrated_at:
            held = Vectors(main=self._main, second=self._second)
            self.calibration = calibrate(held, false_keep=self.false_keep, seed=self.seed)
