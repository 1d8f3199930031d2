"""The vision task: data as it says, chance that can be repeated, a metric that adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparing.core.errors import RequestError
from sparing.core.random_state import random_state
from sparing.core.task import Task
from sparing.tasks.vision import Vision, reference
from sparing.tasks.vision.dataset import Labelled
from sparing.tasks.vision.network import ResNet


@pytest.fixture(scope="module")
def task() -> Vision:
    made = Vision()
    made.prepare(0)
    return made


def batch(task: Vision, *ids: int) -> torch.Tensor:
    return task.train.batch(torch.tensor(ids))["images"]


def test_it_is_a_task_and_its_small_data_is_balanced(task):
    assert isinstance(task, Task)
    assert len(task.train) == 1800
    sizes = torch.bincount(task.domain_of(torch.arange(1800)), minlength=10)
    assert sizes.tolist() == [180] * 10
    assert {name: len(each) for name, each in task.documents(task.model(0)).items()} == (
        dict.fromkeys(task.domains, 60)
    )
    assert sorted(task.order(0, torch.Generator().manual_seed(1)).tolist()) == list(range(1800))


def test_before_prepare_it_says_so():
    for use in (len, lambda train: train.batch(torch.tensor([0]))):
        with pytest.raises(RequestError, match="call prepare"):
            use(Vision().train)
    with pytest.raises(RequestError, match="call prepare"):
        Vision().model(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datset": "cifar10"}, 'no option "datset"; did you mean "dataset"'),
        ({"dataset": "mnist"}, 'unknown dataset "mnist"'),
        ({"split": "train"}, "split must be test or development"),
        ({"widths": []}, "widths must name"),
        ({"widths": [16, 0]}, "widths must be at least 1"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"stem_stride": 3}, "stem_stride must be 1 or 2"),
        ({"crop": 9}, "at most 8"),
        ({"crop": -1}, "crop must be at least 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RequestError, match=message):
        Vision(**options)


def test_the_development_split_keeps_the_test_images_out(task):
    dev = Vision(split="development")
    dev.prepare(0)
    assert len(dev.train) == 1500
    assert {len(each) for each in dev.documents(dev.model(0)).values()} == {30}
    assert dev.fingerprint != task.fingerprint
    rows = {image.numpy().tobytes() for image in dev._ready()[1].images}
    trained = {image.numpy().tobytes() for image in dev._ready()[0].data.images}
    tested = {image.numpy().tobytes() for image in task._ready()[1].images}
    assert not rows & trained
    assert not rows & tested


def test_data_is_the_same_for_every_seed_and_models_are_by_seed(task):
    other = Vision()
    other.prepare(5)
    assert other.fingerprint == task.fingerprint
    before = random_state()["torch"]
    one, same, another = task.model(1), task.model(1), task.model(2)
    assert torch.equal(random_state()["torch"], before)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, another.head.weight)


def test_the_network_has_the_shape_that_was_measured(task):
    assert sum(p.numel() for p in task.model(0).parameters()) == 77_754
    wide = ResNet(
        mean=torch.zeros(3),
        std=torch.ones(3),
        widths=(64, 128, 256, 512),
        blocks=2,
        stem_stride=1,
        classes=10,
    )
    assert sum(p.numel() for p in wide.parameters()) == 11_173_962  # ResNet-18 for 32 x 32
    assert wide(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)


def test_channels_last_changes_memory_and_no_value():
    found = []
    for last in (True, False):
        task = Vision(channels_last=last)
        task.prepare(0)
        images = task.train.batch(torch.arange(8))
        model = task.model(0).double().eval()
        assert model.stem.weight.dtype == torch.float64
        x = (images["images"].double() - model.mean) / model.std
        found.append((images["images"], model.stem(x)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1])


# ---- augmentation --------------------------------------------------------------------------------


def test_an_image_looks_the_same_whatever_came_before(task):
    task.train.set_epoch(3)
    together = batch(task, 4, 900, 17)
    task.train.set_epoch(1)
    moved = batch(task, 4, 900, 17)
    task.train.set_epoch(3)
    assert torch.equal(batch(task, 17, 4), together[[2, 0]])
    assert not torch.equal(moved, together)
    other = Vision()
    other.prepare(1)
    other.train.set_epoch(3)
    assert not torch.equal(batch(other, 4, 900, 17), together)


def test_every_training_image_is_the_original_moved_or_mirrored(task):
    ids = torch.arange(40)
    task.train.set_epoch(2)
    seen = batch(task, *ids.tolist())[:, 0]
    originals = task._ready()[0].data.images[ids][..., 0]
    offsets = set()
    for image, original in zip(seen, originals, strict=True):
        padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
        found = [
            (down, right, mirror)
            for down in range(5)
            for right in range(5)
            for mirror in (False, True)
            if torch.equal(
                image,
                (lambda cut, m: cut.flip(1) if m else cut)(
                    padded[down : down + 28, right : right + 28], mirror
                ),
            )
        ]
        assert found
        offsets |= set(found)
    assert len({o[2] for o in offsets}) == 2
    assert {o[0] for o in offsets} == {o[1] for o in offsets} == set(range(5))


def test_moves_are_even_and_independent_over_images_and_epochs():
    from sparing.tasks.vision.augment import draws, words

    ids = torch.arange(20_000).numpy()
    down, right, mirror = draws(words(ids, 7, 1), 2, True)
    joint = torch.bincount(torch.from_numpy((down * 5 + right) * 2 + mirror), minlength=50)
    expected = 20_000 / 50
    chi = float(((joint - expected) ** 2 / expected).sum())
    assert chi < 90  # 49 degrees of freedom: 85 is passed once in 1,000
    later = draws(words(ids, 7, 2), 2, True)
    agree = float((down == later[0]).mean())
    assert abs(agree - 0.2) < 0.02
    assert not draws(words(ids, 7, 1), 2, False)[2].any()


def test_without_augmentation_batches_are_the_images():
    plain = Vision(crop=0, flip=False)
    plain.prepare(0)
    expected = plain._ready()[0].data.images[[3, 5]].permute(0, 3, 1, 2)
    assert torch.equal(batch(plain, 3, 5), expected)


# ---- the metric ----------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Puts every image into class 3."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.one * torch.eye(10)[3].expand(len(images), 10)


def test_accuracy_is_in_percent_and_the_mean_of_its_documents(task):
    model = Oracle().train()
    metrics = task.evaluate(model)
    assert metrics["accuracy"] == pytest.approx(10.0)
    assert metrics["accuracy/dress"] == 100.0
    assert metrics["accuracy/coat"] == 0.0
    assert model.training
    losses, _ = task.losses(model, task.train.batch(torch.arange(6)))
    assert losses.shape == (6,)


def test_what_is_shown(task):
    model = task.model(0)
    shown = task.show(model, [0, 1799, 5])
    assert len(shown) == 3
    assert all(item["image"].startswith("data:image/png;base64,") for item in shown)
    assert shown[0]["caption"].startswith("T-shirt")
    assert task.show(model, []) == []
    (group,) = task.page(model, 0)["pictures"]
    assert len(group["pictures"]) == 16
    assert all(", read as " in item["caption"] for item in group["pictures"])
    with pytest.raises(RequestError, match="no passages"):
        task.read(model, {})


def test_an_exported_model_is_whole(task, tmp_path: Path):
    model = task.model(4)
    task.export(model, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    again = ResNet(
        mean=torch.zeros(1),
        std=torch.ones(1),
        widths=tuple(about["widths"]),
        blocks=about["blocks"],
        stem_stride=about["stem_stride"],
        classes=len(about["classes"]),
    )
    again.load_state_dict(tensors)
    images = task._ready()[1].images[:4].permute(0, 3, 1, 2)
    assert torch.equal(again.eval()(images), model.eval()(images))


# ---- references ----------------------------------------------------------------------------------


def test_simple_methods_agree_with_plain_loops():
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(40, 6, generator=generator)
    labels = torch.arange(40) % 4
    asked = torch.randn(25, 6, generator=generator)
    nearest = []
    vote = []
    for row in asked:
        distance = ((known - row) ** 2).sum(1)
        order = distance.argsort()[:5]
        counts = torch.bincount(labels[order], minlength=4)
        tied = counts == counts.max()
        vote.append(next(int(labels[i]) for i in order if tied[labels[i]]))
        means = torch.stack([known[labels == c].mean(0) for c in range(4)])
        nearest.append(int(((means - row) ** 2).sum(1).argmin()))
    assert reference.centroids(known, labels, asked, 4).tolist() == nearest
    found = reference.neighbours(known, labels, asked, 4).tolist()
    disagree = [i for i, (a, b) in enumerate(zip(found, vote, strict=True)) if a != b]
    # ties of two classes are decided by the sum of places here, by the nearest there
    for i in disagree:
        order = ((known - asked[i]) ** 2).sum(1).argsort()[:5]
        counts = torch.bincount(labels[order], minlength=4)
        assert counts[found[i]] == counts.max()


def test_a_linear_rule_is_found_by_least_squares():
    generator = torch.Generator().manual_seed(1)
    known = torch.randn(400, 5, generator=generator)
    labels = (known[:, 0] > 0).long()
    found = reference.least_squares(known, labels, known, 2)
    assert float((found == labels).float().mean()) > 0.97


def test_references_are_kept_and_a_damaged_cache_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = torch.randint(0, 256, (30, 2, 2, 1), dtype=torch.uint8)
    data = Labelled(images=images, labels=torch.arange(30) % 3)
    first = reference.references(data, data, ("a", "b", "c"), "f" * 64)
    (kept,) = (tmp_path / "sparing").iterdir()
    changed = kept.read_text().replace('"mean"', '"mean" ')
    kept.write_text(changed)
    assert reference.references(data, data, ("a", "b", "c"), "f" * 64) == first
    kept.write_text("{")
    assert reference.references(data, data, ("a", "b", "c"), "f" * 64) == first
    assert set(first) == {"nearest centroid", "least squares", "5 neighbours"}
    assert all(set(row) == {"a", "b", "c", "mean"} for row in first.values())
