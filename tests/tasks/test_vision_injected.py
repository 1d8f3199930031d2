"""Copies and wrong labels in the training images: exactly as many as asked, and known."""

from __future__ import annotations

import pytest
import torch

from sparing.core.errors import RequestError
from sparing.core.random_state import random_state
from sparing.tasks.vision import Vision
from sparing.tasks.vision.dataset import Labelled
from sparing.tasks.vision.injected import inject


def data(size: int = 50, classes: int = 5) -> Labelled:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(30, 220, (size, 12, 12, 3), generator=random, dtype=torch.uint8)
    return Labelled(images=images, labels=torch.arange(size) % classes)


def test_counts_are_exact_and_originals_keep_their_order():
    before = data()
    found = inject(before, classes=5, duplicates=0.3, noise=0.2)
    assert len(found.data) == 65
    assert int(found.copy.sum()) == 15
    assert int(found.wrong.sum()) == 13
    assert found.origin[~found.copy].tolist() == list(range(50))
    assert torch.equal(found.data.images[~found.copy], before.images)
    assert torch.equal(found.truth, before.labels[found.origin])
    assert int(found.data.labels.min()) >= 0
    assert int(found.data.labels.max()) < 5
    assert not bool((found.exact & ~found.copy).any())
    # copies are among the others, not behind them
    assert int(found.copy[:50].sum()) > 0


def test_exact_copies_are_exact_and_the_rest_a_little_changed():
    before = data(200)
    found = inject(before, classes=5, duplicates=0.5, noise=0.0)
    same = (found.data.images == before.images[found.origin]).flatten(1).all(1)
    assert bool(same[found.exact].all())
    changed = found.copy & ~found.exact
    assert int(changed.sum()) > 20
    assert not bool(same[changed].any())
    apart = (found.data.images[changed].double() - before.images[found.origin][changed]).abs()
    # grain and contrast move a pixel by a few steps; only a move by a pixel moves it by more
    quiet = apart.flatten(1).median(1).values < 8
    assert 0.4 < float(quiet.double().mean()) < 0.8


def test_it_repeats_and_leaves_the_global_generators():
    before = random_state()["torch"]
    first, second = (inject(data(), classes=5, duplicates=0.4, noise=0.3) for _ in range(2))
    assert torch.equal(random_state()["torch"], before)
    assert torch.equal(first.data.images, second.data.images)
    assert torch.equal(first.data.labels, second.data.labels)


def test_human_labels_are_those_that_somebody_gave():
    before = data(300)
    people = torch.stack([before.labels.clone() for _ in range(3)], 1)
    people[:60, 0] = (before.labels[:60] + 1) % 5
    people[:30, 1:] = ((before.labels[:30] + 2) % 5)[:, None]
    found = inject(before, classes=5, duplicates=0.0, noise=0.1, human=people)
    assert int(found.wrong.sum()) == 30
    assert not bool(found.wrong[60:].any())
    given = (found.data.labels[:, None] == people).any(1)
    assert bool(given[found.wrong].all())
    # three of three got the first ones wrong, one of three the next
    assert int(found.wrong[:30].sum()) > int(found.wrong[30:60].sum())
    with pytest.raises(RequestError, match=r"90 wrong labels, and people gave only 60"):
        inject(before, classes=5, duplicates=0.0, noise=0.3, human=people)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duplicates": -0.1}, "duplicates must be"),
        ({"noise": 1.5}, "noise must be"),
        ({"noise_labels": "mine"}, "noise_labels must be uniform or human"),
        ({"noise_labels": "human"}, "people labelled cifar10 anew, not fashion-mnist-small"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RequestError, match=message):
        Vision(**options)


def test_off_by_default_and_held_out_images_are_never_touched():
    plain, other = Vision(), Vision(duplicates=0.2, noise=0.2)
    for task in (plain, other):
        task.prepare(0)
    assert plain._injected is None
    assert len(other.train) == 2160
    assert other.fingerprint != plain.fingerprint
    assert torch.equal(plain._ready()[1].images, other._ready()[1].images)
    assert torch.equal(plain._ready()[1].labels, other._ready()[1].labels)
    shown = other.page(other.model(0).eval(), 0)
    assert sorted(shown["planted"]) == ["copies", "wrong"]
    assert len(shown["planted"]["wrong"]) == 432
    assert sum(len(group) - 1 for group in shown["planted"]["copies"]) == 360
    assert shown["tables"][0]["rows"][0] == ["images as they were", "1,800"]
    wrong = shown["planted"]["wrong"][0]
    assert ", in truth " in other.show(other.model(0).eval(), [wrong])[0]["caption"]
    assert plain.page(plain.model(0).eval(), 0).keys() == {"pictures", "remark"}


def test_plain_batches_are_not_augmented():
    task = Vision()
    task.prepare(0)
    index = torch.tensor([3, 5, 8])
    raw = task._ready()[0].data
    assert torch.equal(task.train.plain(index)["images"].permute(0, 2, 3, 1), raw.images[index])
    assert not torch.equal(task.train.batch(index)["images"], task.train.plain(index)["images"])
