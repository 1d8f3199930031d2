"""What perceptual hashes find among images, what they mistake for copies, and what they cost.

    SPARING_DATA=... python benchmarks/image_hash.py

Pairs of different images within 4 bits: of the first 2,000 of CIFAR-10, and of those that train in
the shipped part of Fashion-MNIST, whose 28 pixels are too few for a hash in a pool and are hashed
here all the same. Copies found: 1,000 images of CIFAR-10 enlarged to 128 and to 256 pixels, saved
as JPEG, and made anew in other sizes, qualities, brightness and cut. Cost: CPU time an image of the
hash and of the encoder ``pixels``, median of five passes.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import imagehash
import numpy as np
import torch
from PIL import Image, ImageEnhance

from record import write
from sparing.pool.copies.images import LEAST, marks
from sparing.pool.encoders import encode, encoder
from sparing.pool.items import Item
from sparing.tasks.vision.sources import load

BITS, COMPARED, COPIED, TIMED, PASSES = 4, 2000, 1000, 256, 5
Picture = Image.Image


def saved(picture: Picture, kind: str = "JPEG", quality: int = 90) -> Item:
    held = io.BytesIO()
    picture.save(held, kind, quality=quality)
    return Item(key="", image=held.getvalue())


def apart(one: Any, other: Any) -> Any:
    return np.bitwise_count(one ^ other)


def pairs(hashes: Any, labels: Any) -> dict[str, Any]:
    """Pairs of different images within the limit."""
    near = np.triu(apart(hashes[:, None], hashes[None, :]) <= BITS, 1)
    one, two = np.nonzero(near)
    return {
        "images": len(hashes),
        "pairs": len(one),
        "images in pairs, %": round(100 * len(np.union1d(one, two)) / len(hashes), 2),
        "pairs of one class, %": round(100 * float((labels[one] == labels[two]).mean()), 1)
        if len(one)
        else None,
    }


def cut(picture: Picture) -> Picture:
    side, off = picture.size[0], round(0.025 * picture.size[0])
    return picture.crop((off, off, side - off, side - off))


CHANGES: dict[str, Callable[[Picture], Item]] = {
    "half as large": lambda p: saved(p.resize((p.size[0] // 2, p.size[1] // 2))),
    "JPEG of quality 75": lambda p: saved(p, quality=75),
    "JPEG of quality 40": lambda p: saved(p, quality=40),
    "brightness 1.15": lambda p: saved(ImageEnhance.Brightness(p).enhance(1.15)),
    "brightness 0.8": lambda p: saved(ImageEnhance.Brightness(p).enhance(0.8)),
    "cut by 2.5 % on each side": lambda p: saved(cut(p)),
}


def cost(items: list[Item]) -> dict[str, float]:
    """Milliseconds of CPU an image."""
    pixels = encoder("pixels")
    told = {}
    for name, work in (("hash", marks), ("encoder pixels", lambda part: encode(pixels, part))):
        seconds = []
        for _ in range(PASSES):
            start = time.process_time()
            work(items)
            seconds.append(time.process_time() - start)
        told[name] = round(1000 * statistics.median(seconds) / len(items), 3)
    return told


def main() -> None:
    torch.set_num_threads(1)
    cifar, fashion = load("cifar10").train, load("fashion-mnist-small").train
    pictures = [Image.fromarray(image.numpy()) for image in cifar.images[:COMPARED]]
    grey = [Image.fromarray(image.squeeze().numpy()) for image in fashion.images[:COMPARED]]
    small = [np.packbits(imagehash.phash(p).hash.ravel()).view(">u8")[0] for p in grey]
    results: dict[str, Any] = {
        "bits": BITS,
        "least side": LEAST,
        "CIFAR-10": pairs(marks([saved(p, "PNG") for p in pictures]), cifar.labels.numpy()),
        "Fashion-MNIST, 28 pixels": pairs(np.array(small, np.uint64), fashion.labels.numpy()),
        "copies found, %": {},
        "CPU time an image, ms": {},
    }
    for side in (128, 256):
        large = [p.resize((side, side), Image.Resampling.BICUBIC) for p in pictures[:COPIED]]
        first = marks([saved(p) for p in large])
        for name, change in CHANGES.items():
            found = apart(first, marks([change(p) for p in large])) <= BITS
            results["copies found, %"][f"{side} pixels, {name}"] = round(100 * found.mean(), 1)
    wide = [p.resize((224, 224), Image.Resampling.BICUBIC) for p in pictures[:TIMED]]
    results["CPU time an image, ms"] = {
        "CIFAR-10, PNG": cost([saved(p, "PNG") for p in pictures[:TIMED]]),
        "224 pixels, JPEG": cost([saved(p) for p in wide]),
        "224 pixels, PNG": cost([saved(p, "PNG") for p in wide]),
    }
    print(results)
    write("image_hash", results, seeds=[])


if __name__ == "__main__":
    main()
