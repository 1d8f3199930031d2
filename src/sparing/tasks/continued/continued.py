"""The task: a trained causal model, domains of text, one loss a window, nats a token out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_known
from sparing.core.decoding import continued
from sparing.core.errors import RequestError
from sparing.core.modes import evaluating
from sparing.core.task import Samples
from sparing.tasks import causal, figures, scores
from sparing.tasks.continued import own
from sparing.tasks.continued.options import OWN, ContinuedOptions
from sparing.tasks.continued.texts import split_of, windows
from sparing.tasks.language import corpus
from sparing.tasks.unprepared import Unprepared

_SHOWN, _PROMPT = 200, 16
_HELD_SEED = {"final": 1_000_003, "development": 2_000_003}
"""Added to the seed of what the model writes: held-out text is drawn apart."""


@final
class Windows:
    """All domains' windows, numbered domain by domain: (N, S + 1) tokens, and whose each is."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.rows = torch.cat([part.to(torch.int32) for part in parts])
        self.source = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """``index`` (B,) int64 -> ``input_ids`` and the tokens after them, ``labels``: (B, S)."""
        rows = self.rows[index].long()
        return {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


@final
class Continued:
    """A trained causal language model is trained on, on domains of text in its own tokens.

    Constructed from the keywords of ``ContinuedOptions``. A sample is a window of ``seq_len``
    tokens; its loss, and the metric on held-out windows, is the mean cross entropy in nats a
    token; the metric is the mean over domains.
    """

    name: ClassVar[str] = "continued"
    Options: ClassVar[type[Any]] = ContinuedOptions
    metric: ClassVar[str] = "nats_per_token"
    higher_is_better: ClassVar[bool] = False
    model_needs_data: ClassVar[bool] = False
    evaluation: ClassVar[tuple[str, ...]] = (
        "model", "domains", "files", "windows", "split", "seq_len", "temperature", "own_seed",
        "eval_windows",
    )  # fmt: skip
    about_metric: ClassVar[str] = (
        "Nats a token is the mean cross entropy of text that was not trained on, in the model's "
        "own tokens: lower is better. Every domain counts alike."
    )

    def __init__(self, **options: Any) -> None:
        require_known("Continued", options, ContinuedOptions)
        self.options = ContinuedOptions(**options)
        self.domains: tuple[str, ...] = self.options.domains
        self.tokens_per_sample: int = self.options.seq_len
        self.fingerprint: str = ""
        self.train: Samples = Unprepared("continued")
        self._train: Windows | None = None
        self._held: Windows | None = None
        self._tokenizer: Any = None

    @property
    def folder(self) -> Path:
        """Where the trained model is. Raises RequestError if it has no weights there."""
        return causal.directory(self.options.model)

    def prepare(self, seed: int) -> None:
        """Read and tokenise the texts, and let the model write; the same for every ``seed``.

        Raises RequestError for a directory without a whole model or tokenizer, for windows longer
        than it takes, and for text that cannot be read or has less than one window.
        """
        self._tokenizer = causal.tokenizer_of(self.folder)
        train, held = [], []
        model: nn.Module | None = None
        for name in self.domains:
            if name == OWN:
                model = self._fitting(causal.pretrained(self.folder))
                parts = [self._written(model, held_out=place) for place in (False, True)]
            else:
                parts = self._texts(name)
            train.append(parts[0])
            held.append(parts[1])
        self._train, self._held = Windows(train), Windows(held)
        self.train = self._train
        digest = hashlib.sha256("/".join(self.domains).encode())
        for part in (self._train, self._held):
            digest.update(part.rows.numpy().astype("<i4").tobytes())
            digest.update(part.source.numpy().astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def _written(self, model: nn.Module, *, held_out: bool) -> Tensor:
        options = self.options
        return own.written(
            model,
            self.folder,
            options.eval_windows if held_out else options.windows,
            options.seq_len + 1,
            seed=options.own_seed + (_HELD_SEED[options.split] if held_out else 0),
            temperature=options.temperature,
        )

    def _texts(self, name: str) -> list[Tensor]:
        options, tokenizer = self.options, self._tokenizer
        split = split_of(name, options.files or {})
        if options.split == "development":
            split = corpus.development(split)
        length = options.seq_len
        return [
            windows(name, "training", split.train, tokenizer, length, options.windows),
            windows(name, "held-out", split.held_out, tokenizer, length, options.eval_windows),
        ]

    def _fitting(self, model: nn.Module) -> nn.Module:
        causal.check_length(model, self.options.seq_len, str(self.folder))
        if self._tokenizer is not None:
            causal.check_vocabulary(model, len(self._tokenizer), str(self.folder))
        return model

    def _ready(self) -> tuple[Windows, Windows]:
        if self._train is None or self._held is None:
            raise RequestError("the continued task has no data yet; call prepare(seed) first")
        return self._train, self._held

    def model(self, seed: int) -> nn.Module:
        """The trained model, the same for every ``seed``, in training mode."""
        return self._fitting(causal.pretrained(self.folder)).train()

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, positions in ``domains``."""
        return self._ready()[0].source[index]

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """A permutation of all windows: each domain by its size."""
        drawn = torch.Generator().manual_seed(generator.initial_seed() + epoch)
        return torch.randperm(len(self._ready()[0]), generator=drawn)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Mean cross entropy of each window, nats a token, (B,) float32, and the outputs."""
        labels = batch["labels"]
        outputs = model(input_ids=batch["input_ids"], use_cache=False)
        each = F.cross_entropy(
            outputs.logits.flatten(0, 1).float(), labels.flatten(), reduction="none"
        )
        return each.view(labels.shape).mean(dim=1), outputs

    def documents(self, model: nn.Module) -> dict[str, Tensor]:
        """Nats a token of each held-out window, by domain: (n,) float64 each, on the CPU."""
        held, size = self._ready()[1], self.options.eval_batch
        return scores.by_domain(model, self.losses, held, self.domains, size)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats a token on held-out windows: the domains' mean, and each domain's."""
        return scores.means(self.metric, self.documents(model))

    def references(self) -> dict[str, dict[str, float]]:
        """What the trained model reaches before anything is done to it, by domain and mean."""
        whole = f"{self.fingerprint}/{own.hash_of(self.folder)}"
        key = hashlib.sha256(whole.encode()).hexdigest()
        return figures.kept("continued", key, {*self.domains, "mean"}, self._before)

    def _before(self) -> figures.Scores:
        found = self.evaluate(causal.pretrained(self.folder))
        row = {name: found[f"{self.metric}/{name}"] for name in self.domains}
        return {"before": {**row, "mean": found[self.metric]}}

    def export(self, model: nn.Module, path: Path) -> None:
        """Write a model without experts as transformers reads it, whole or not at all."""
        causal.export(model, path)

    def load(self, path: Path) -> nn.Module:
        """What ``export`` wrote, in evaluation mode. Raises RequestError if it cannot be read."""
        return causal.exported(path)

    def page(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """``samples``: what the model writes after the beginning of a held-out window."""
        held = self._ready()[1]
        size = min(_PROMPT, self.options.seq_len // 2)
        firsts = [int((held.source == place).nonzero()[0]) for place in range(len(self.domains))]
        prompts = held.rows[firsts, :size].long()
        drawn = continued(
            model,
            prompts,
            min(self.options.sample_tokens, self.options.seq_len - size),
            generator=torch.Generator().manual_seed(seed),
            temperature=0.8,
        )
        return {
            "samples": [
                {"domain": name, "prompt": self._text(asked), "text": self._text(told)}
                for name, asked, told in zip(self.domains, prompts, drawn, strict=True)
            ],
            "passages": [],
        }

    def _text(self, ids: Tensor) -> str:
        found: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return found

    def show(self, model: nn.Module, index: Sequence[int]) -> list[dict[str, str]]:
        """The beginnings of training windows: {"text", "caption": the domain}."""
        train = self._ready()[0]
        return [
            {
                "text": self._text(train.rows[i])[:_SHOWN],
                "caption": self.domains[int(train.source[i])],
            }
            for i in index
        ]

    def read(self, model: nn.Module, passage: dict[str, Any]) -> None:
        """Run the model over a passage's tokens."""
        with evaluating(model):
            model(input_ids=torch.tensor([passage["ids"]]), use_cache=False)
