"""The task: images in, a small residual network, one loss per image, accuracy out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparing.core.checks import require_known
from sparing.core.errors import RequestError
from sparing.core.modes import evaluating
from sparing.core.state import atomic_save, atomic_write_json, replacing
from sparing.core.task import Samples
from sparing.tasks import scores
from sparing.tasks.unprepared import Unprepared
from sparing.tasks.vision import reference, sources
from sparing.tasks.vision.dataset import Images, Labelled, development
from sparing.tasks.vision.injected import Injected, inject
from sparing.tasks.vision.network import ResNet
from sparing.tasks.vision.options import VisionOptions
from sparing.tasks.vision.picture import data_uri

_SHOWN = 16


@final
class Vision:
    """Image classification on Fashion-MNIST, a small part of it, or CIFAR-10.

    Constructed from the keywords of ``VisionOptions``; an unknown one raises RequestError. A
    sample is an image and its loss the cross entropy, in nats. The metric is the accuracy in
    percent on held-out images, the mean over classes, of which all have as many images.
    """

    name: ClassVar[str] = "vision"
    Options: ClassVar[type[Any]] = VisionOptions
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    evaluation: ClassVar[tuple[str, ...]] = (
        "dataset",
        "split",
        "duplicates",
        "noise",
        "noise_labels",
    )
    domain_name: ClassVar[str] = "class"
    about_metric: ClassVar[str] = (
        "Accuracy is the percentage of images that the model has not seen and puts into the right "
        "class, the mean over classes: higher is better."
    )
    tokens_per_sample = 1

    def __init__(self, **options: Any) -> None:
        require_known("Vision", options, VisionOptions)
        self.options = VisionOptions(**options)
        self.domains: tuple[str, ...] = ()
        self.fingerprint: str = ""
        self.train: Samples = Unprepared("vision")
        self.remark = ""
        self._images: Images | None = None
        self._held_out: Labelled | None = None
        self._injected: Injected | None = None

    def prepare(self, seed: int) -> None:
        """Load the images; they are the same for every ``seed``, how they are moved is not.

        Raises RequestError if the data set is not at hand and cannot be fetched.
        """
        options = self.options
        source = sources.load(options.dataset)
        train, held_out, human = source.train, source.test, source.human
        if options.split == "development":
            apart = development(train)
            train, held_out = train.take(~apart), train.take(apart)
            human = None if human is None else human[~apart]
        if options.duplicates or options.noise:
            self._injected = inject(
                train,
                classes=len(source.classes),
                duplicates=options.duplicates,
                noise=options.noise,
                human=self._people(human) if options.noise_labels == "human" else None,
            )
            train = self._injected.data
        self._held_out = held_out
        self._images = Images(
            train,
            seed=seed,
            crop=options.crop,
            flip=options.flip,
            channels_last=options.channels_last,
        )
        self.train = self._images
        self.domains = source.classes
        self.remark = source.remark
        self.fingerprint = sources.fingerprint(train, held_out)

    def _people(self, human: Tensor | None) -> Tensor:
        if human is None:
            raise RequestError(
                "noise_labels=human needs the labels of CIFAR-10N beside the images, and the "
                "data at hand has none; set noise_labels=uniform"
            )
        return human

    def _ready(self) -> tuple[Images, Labelled]:
        if self._images is None or self._held_out is None:
            raise RequestError("the vision task has no data yet; call prepare(seed) first")
        return self._images, self._held_out

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised ``ResNet``; the global generators stay as they were."""
        pixels = self._ready()[0].data.images.flatten(0, 2).double() / 255  # (N H W, C)
        options = self.options
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed the accelerators' generators too.
            torch.default_generator.manual_seed(seed)
            model = ResNet(
                mean=pixels.mean(0).float(),
                std=pixels.std(0).clamp(min=1e-3).float(),
                widths=options.widths,
                blocks=options.blocks,
                stem_stride=options.stem_stride,
                classes=len(self.domains),
            )
        if options.channels_last:
            return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
        return model

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, the class of each image as a position in ``domains``."""
        return self._ready()[0].data.labels[index]

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """All images in random order, by the generator's seed."""
        return torch.randperm(len(self._ready()[0]), generator=generator)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The cross entropy of each image in nats, (B,) float32, and the logits (B, classes)."""
        logits = model(batch["images"])
        return F.cross_entropy(logits.float(), batch["labels"], reduction="none"), logits

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in percent on the held-out images: the classes' mean and each class's."""
        return scores.means(self.metric, self.documents(model))

    def documents(self, model: nn.Module) -> dict[str, Tensor]:
        """By class, 100 for each held-out image that is put right, else 0: (n,) float64."""
        _, held_out = self._ready()
        right = 100 * (self._logits(model, held_out.images).argmax(1) == held_out.labels).double()
        return {name: right[held_out.labels == i] for i, name in enumerate(self.domains)}

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images (N, H, W, C) as they are -> (N, classes) float32 on the CPU."""
        first = next(model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        found = []
        with evaluating(model):
            for part in torch.split(images, self.options.eval_batch):
                piece = self._ready()[0].laid_out(part).to(device)
                found.append(model(piece).float().cpu())
        return torch.cat(found)

    def export(self, model: nn.Module, path: Path) -> None:
        """Write ``model.safetensors`` and ``config.json``, what ``ResNet`` is built from."""
        options = asdict(self.options)
        shape = {key: options[key] for key in ("widths", "blocks", "stem_stride")}
        about = {"format": 1, "classes": list(self.domains), **shape}
        with replacing(path) as aside:
            aside.mkdir(parents=True, exist_ok=True)
            tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
            atomic_save(aside / "model.safetensors", tensors)
            atomic_write_json(aside / "config.json", about)

    def load(self, path: Path) -> nn.Module:
        """What ``export`` wrote, in evaluation mode. Raises RequestError if it cannot be read."""
        try:
            about = json.loads((path / "config.json").read_text(encoding="utf-8"))
            tensors = load_file(path / "model.safetensors")
            model = ResNet(
                mean=tensors["mean"].flatten(),
                std=tensors["std"].flatten(),
                classes=len(about["classes"]),
                widths=tuple(about["widths"]),
                blocks=about["blocks"],
                stem_stride=about["stem_stride"],
            )
            model.load_state_dict(tensors)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise RequestError(
                f"there is no whole image classifier in {path}: {str(error).splitlines()[0]}"
            ) from error
        return model.eval()

    def references(self) -> dict[str, dict[str, float]]:
        """Accuracy of simple known methods, by class and ``"mean"``; see ``reference``."""
        images, held_out = self._ready()
        return reference.references(images.data, held_out, self.domains, self.fingerprint)

    def page(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """``pictures``: the held-out images that the model is surest of, and wrong about."""
        _, held_out = self._ready()
        chances = self._logits(model, held_out.images).softmax(1)
        sure, guess = chances.max(1)
        wrong = (guess != held_out.labels).nonzero().flatten()
        worst = wrong[sure[wrong].argsort(descending=True, stable=True)][:_SHOWN]
        group = {
            "title": "Held-out images that it is surest of, and wrong about",
            "pictures": self._pictures(held_out.take(worst), guess[worst]),
        }
        shown: dict[str, Any] = {"pictures": [group] if len(worst) else []}
        if self._injected is not None:
            shown |= self._injected.page()
        return shown | ({"remark": self.remark} if self.remark else {})

    def show(self, model: nn.Module, index: Sequence[int]) -> list[dict[str, str]]:
        """Training images, unmoved: {"image": data URI, "caption": class, what it is read as}."""
        chosen = self._ready()[0].data.take(torch.tensor(list(index), dtype=torch.int64))
        if not len(chosen):
            return []
        guess = self._logits(model, chosen.images).argmax(1)
        known = self._injected
        return self._pictures(chosen, guess, known and known.truth[torch.tensor(list(index))])

    def _pictures(
        self, images: Labelled, guess: Tensor, truth: Tensor | None = None
    ) -> list[dict[str, str]]:
        found = []
        labels = images.labels.tolist()
        true = labels if truth is None else truth.tolist()
        for image, label, right, read in zip(
            images.images, labels, true, guess.tolist(), strict=True
        ):
            told = self.domains[label]
            if right != label:
                told += f", in truth {self.domains[right]}"
            if read != label:
                told += f", read as {self.domains[read]}"
            found.append({"image": data_uri(image), "caption": told})
        return found

    def read(self, model: nn.Module, passage: dict[str, Any]) -> None:
        """There are no passages of text to read."""
        raise RequestError("the vision task has no passages to read; look at its pictures")
