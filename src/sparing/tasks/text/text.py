"""The task: texts in, an encoder with a linear layer, one loss per text, accuracy out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_known
from sparing.core.errors import RequestError
from sparing.core.modes import evaluating
from sparing.core.task import Samples
from sparing.tasks import scores
from sparing.tasks.text import encoders, reference, sources
from sparing.tasks.text.dataset import Texts
from sparing.tasks.text.options import TextOptions
from sparing.tasks.text.split import split
from sparing.tasks.unprepared import Unprepared

_SHOWN = 8
_SHOWN_CHARACTERS = 240
_LOOKED_AT = 500
"""Held-out texts that the page chooses from: reading them takes as long as evaluating them."""


@final
class Text:
    """Classification of passages by source, or of news, by a Hugging Face encoder.

    Constructed from the keywords of ``TextOptions``; an unknown one raises RequestError. A sample
    is a text and its loss the cross entropy, in nats. The metric is the accuracy in percent on
    held-out texts, the mean over classes.
    """

    name: ClassVar[str] = "text"
    Options: ClassVar[type[Any]] = TextOptions
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    evaluation: ClassVar[tuple[str, ...]] = ("dataset", "split", "max_length")
    domain_name: ClassVar[str] = "class"
    model_needs_data: ClassVar[bool] = False
    about_metric: ClassVar[str] = (
        "Accuracy is the percentage of texts that the model has not seen and puts into the right "
        "class, the mean over classes: higher is better."
    )

    def __init__(self, **options: Any) -> None:
        require_known("Text", options, TextOptions)
        self.options = TextOptions(**options)
        self.domains: tuple[str, ...] = ()
        self.fingerprint: str = ""
        self.tokens_per_sample: int = 1
        self.train: Samples = Unprepared("text")
        self.remark = ""
        self._texts: Texts | None = None
        self._held_out: Texts | None = None

    def prepare(self, seed: int) -> None:
        """Load and tokenise the texts. They and their split are the same for every ``seed``.

        Raises RequestError if the data set or the encoder is not at hand, or cannot be read.
        """
        options = self.options
        encoders.folder(options.encoder)  # before the data is read
        source = sources.load(options.dataset)
        parts = split(source.keys, source.data.labels)
        chosen = parts.test if options.split == "test" else parts.development
        made = []
        for part in (source.data.take(parts.train), source.data.take(chosen)):
            counts = torch.bincount(part.labels, minlength=len(source.classes))
            if not counts.all():
                missing = source.classes[int(counts.argmin())]
                raise RequestError(
                    f'{options.dataset} has too few texts of the class "{missing}": '
                    "each class needs some to train on and some to hold out"
                )
            made.append(
                Texts(part, encoders.tokens(options.encoder, part.texts, options.max_length))
            )
        self.train = self._texts = made[0]
        self._held_out = made[1]
        self.domains = source.classes
        self.remark = source.remark
        self.tokens_per_sample = round(float(made[0].tokens.lengths.double().mean()))
        self.fingerprint = sources.fingerprint(*(texts.data for texts in made))

    def _ready(self) -> tuple[Texts, Texts]:
        if self._texts is None or self._held_out is None:
            raise RequestError("the text task has no data yet; call prepare(seed) first")
        return self._texts, self._held_out

    def model(self, seed: int) -> nn.Module:
        """A ``TextClassifier``: the encoder as it is, what is new drawn by ``seed``.

        The global generators stay as they were. Raises RequestError for a folder that holds no
        encoder.
        """
        from sparing.tasks.text.classifier import TextClassifier

        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed the accelerators' generators too.
            torch.default_generator.manual_seed(seed)
            encoder = encoders.build(self.options.encoder, self.options.max_length)
            # again, so that the new layer does not depend on what the encoder drew
            torch.default_generator.manual_seed(seed)
            model = TextClassifier(encoder, len(sources.CLASSES[self.options.dataset]))
        if self.options.freeze == "encoder":
            model.encoder.requires_grad_(False)
        return model

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, the class of each text as a position in ``domains``."""
        return self._ready()[0].data.labels[index]

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """All texts in random order, by the generator's seed."""
        return torch.randperm(len(self._ready()[0]), generator=generator)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The cross entropy of each text in nats, (B,) float32, and the model's outputs."""
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        each = F.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")
        return each, outputs

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in percent on the held-out texts: the classes' mean and each class's."""
        return scores.means(self.metric, self.documents(model))

    def documents(self, model: nn.Module) -> dict[str, Tensor]:
        """By class, 100 for each held-out text that is put right, else 0: (n,) float64."""
        _, held_out = self._ready()
        labels = held_out.data.labels
        guess = self._logits(model, held_out, torch.arange(len(held_out))).argmax(1)
        right = 100 * (guess == labels).double()
        return {name: right[labels == i] for i, name in enumerate(self.domains)}

    def _logits(self, model: nn.Module, texts: Texts, index: Tensor) -> Tensor:
        """Of the texts ``index``, (n,): (n, classes) float32 on the CPU.

        Texts of like length are read together, so that little is read that is padding.
        """
        first = next(model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        found = torch.empty(len(index), len(self.domains))
        by_length = texts.tokens.lengths[index].argsort(stable=True)
        with evaluating(model):
            for part in torch.split(by_length, self.options.eval_batch):
                batch = {k: v.to(device) for k, v in texts.batch(index[part]).items()}
                found[part] = self.losses(model, batch)[1].logits.float().cpu()
        return found

    def export(self, model: nn.Module, path: Path) -> None:
        """Write the classifier as ``saved.read`` reads it, whole or not at all."""
        from sparing.tasks.text import saved

        folder = encoders.folder(self.options.encoder)
        saved.write(model, path, self.domains, self.options.max_length, folder)

    def load(self, path: Path) -> nn.Module:
        """What ``export`` wrote, in evaluation mode. Raises RequestError if it cannot be read."""
        from sparing.tasks.text import saved

        return saved.read(path)[0]

    def references(self) -> dict[str, dict[str, float]]:
        """Accuracy of simple known methods, by class and ``"mean"``; see ``reference``."""
        texts, held_out = self._ready()
        return reference.references(texts.data, held_out.data, self.domains, self.fingerprint)

    def page(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """``pictures``: the held-out texts that the model is surest of, and wrong about."""
        _, held_out = self._ready()
        count = min(_LOOKED_AT, len(held_out))
        index = torch.arange(count) * len(held_out) // count
        # in float64, where many that it is sure of are not all 1
        sure, guess = self._logits(model, held_out, index).double().softmax(1).max(1)
        wrong = (guess != held_out.data.labels[index]).nonzero().flatten()
        worst = wrong[sure[wrong].argsort(descending=True, stable=True)][:_SHOWN]
        group = {
            "title": "Held-out texts that it is surest of, and wrong about",
            "pictures": self._told(held_out, index[worst], guess[worst]),
        }
        shown: dict[str, Any] = {"pictures": [group] if len(worst) else []}
        return shown | ({"remark": self.remark} if self.remark else {})

    def show(self, model: nn.Module, index: Sequence[int]) -> list[dict[str, str]]:
        """Training texts: {"text": its beginning, "caption": class, what it is read as}."""
        chosen = torch.tensor(list(index), dtype=torch.int64)
        if not len(chosen):
            return []
        texts, _ = self._ready()
        return self._told(texts, chosen, self._logits(model, texts, chosen).argmax(1))

    def _told(self, texts: Texts, index: Tensor, guess: Tensor) -> list[dict[str, str]]:
        found = []
        chosen = texts.data.take(index)
        for text, label, read in zip(
            chosen.texts, chosen.labels.tolist(), guess.tolist(), strict=True
        ):
            caption = self.domains[label]
            if read != label:
                caption += f", read as {self.domains[read]}"
            if len(text) > _SHOWN_CHARACTERS:
                text = text[:_SHOWN_CHARACTERS].rstrip() + "…"
            found.append({"text": text, "caption": caption})
        return found

    def read(self, model: nn.Module, passage: dict[str, Any]) -> None:
        """There are no passages of bytes to read."""
        raise RequestError("the text task has no passages to read byte by byte")
