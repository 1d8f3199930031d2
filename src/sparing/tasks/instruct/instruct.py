"""The task: instructions from many sources, loss on completions, held-out loss by source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.checks import require_known
from sparing.core.errors import RequestError, unknown
from sparing.core.modes import evaluating
from sparing.core.task import Samples
from sparing.tasks import causal, scores
from sparing.tasks.instruct import derived, reference, rows, templates
from sparing.tasks.instruct.examples import Examples
from sparing.tasks.instruct.options import InstructOptions
from sparing.tasks.instruct.packing import IGNORED
from sparing.tasks.instruct.tokens import ByteTokens, HubTokens, Tokens
from sparing.tasks.unprepared import Unprepared

_SHOWN = 200


@final
class Instruct:
    """Instruction tuning of a small model on sources of very different sizes.

    Constructed from the keywords of ``InstructOptions``. A sample is an example; its loss is the
    mean cross entropy of its completion's tokens, in nats. The metric is that loss on held-out
    examples, the mean over sources.
    """

    name: ClassVar[str] = "instruct"
    Options: ClassVar[type[Any]] = InstructOptions
    metric: ClassVar[str] = "completion_loss"
    higher_is_better: ClassVar[bool] = False
    evaluation: ClassVar[tuple[str, ...]] = (
        "dataset", "files", "sources", "per_source", "split", "held_out", "model", "tokenizer",
        "seq_len", "eval_examples",
    )  # fmt: skip
    domain_name: ClassVar[str] = "source"
    about_metric: ClassVar[str] = (
        "Completion loss is the mean cross entropy, in nats a token, of the answers that were not "
        "trained on: lower is better. Every source counts alike, whatever its size."
    )

    def __init__(self, **options: Any) -> None:
        require_known("Instruct", options, InstructOptions)
        self.options = InstructOptions(**options)
        self.domains: tuple[str, ...] = ()
        self.tokens_per_sample: int = 1  # examples differ in length: budgets count samples
        self.fingerprint: str = ""
        self.train: Samples = Unprepared("instruct")
        self._train: Examples | None = None
        self._held: Examples | None = None
        self.tokens: Tokens = ByteTokens()

    def prepare(self, seed: int) -> None:
        """Read and encode the sources, the same for every ``seed``.

        Raises RequestError, with file and line, for what is no example, for an empty source, and
        for chat with a tokenizer that has no template.
        """
        options = self.options
        if options.model is not None:
            self.tokens = HubTokens(options.tokenizer or str(causal.directory(options.model)))
        elif options.tokenizer is not None:
            self.tokens = HubTokens(options.tokenizer)
        parts = self._parts()
        self.domains = tuple(parts)
        made = []
        for place, most in ((0, options.per_source), (1, options.eval_examples)):
            chosen = [
                (source, where, row)
                for source, part in enumerate(parts.values())
                for where, row in _spread(part[place], most)
            ]
            made.append(Examples(chosen, self.tokens, seq_len=options.seq_len, pack=options.pack))
        self._train, self._held = made
        self.train = self._train
        whole = "/".join([*self.domains, *(part.fingerprint() for part in made)])
        self.fingerprint = hashlib.sha256(whole.encode()).hexdigest()

    def _parts(self) -> dict[str, tuple[list[Any], list[Any]]]:
        options = self.options
        if options.dataset == "files":
            assert options.files is not None
            found = rows.load(options.files, options.split, options.held_out)
        else:
            load = derived.load if options.dataset == "derived" else templates.load
            found = {
                name: (_numbered(name, train), _numbered(name, held))
                for name, (train, held) in load(options.split).items()
            }
        for name in options.sources or ():
            if name not in found:
                raise unknown("source", name, found)
        kept = {name: found[name] for name in options.sources or found}
        for name, (train, held) in kept.items():
            if not train or not held:
                raise RequestError(f'the source "{name}" is empty; leave it out of task.sources')
        return kept

    def _ready(self) -> tuple[Examples, Examples]:
        if self._train is None or self._held is None:
            raise RequestError("the instruct task has no data yet; call prepare(seed) first")
        return self._train, self._held

    def model(self, seed: int) -> nn.Module:
        """A fresh ``LlamaForCausalLM``, or the trained model that the options name.

        The global generators stay as they were. Raises RequestError for a directory without a
        whole model, and for one whose vocabulary or longest sequence does not fit.
        """
        shape = self.options
        if shape.model is not None:
            trained = causal.pretrained(shape.model)
            causal.check_vocabulary(trained, self.tokens.size, shape.model)
            causal.check_length(trained, shape.seq_len, shape.model)
            return trained.train()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.tokens.size,
            hidden_size=shape.dim,
            intermediate_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.seq_len,
            initializer_range=shape.init_std,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model: Any = LlamaForCausalLM(config)
            if shape.embed_std is not None:
                nn.init.normal_(model.get_input_embeddings().weight, std=shape.embed_std)
        built: nn.Module = model
        return built

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, positions in ``domains``."""
        return self._ready()[0].domain_of(index)

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """A permutation of all examples: each source by its size."""
        own = torch.Generator().manual_seed(generator.initial_seed() + epoch)
        return torch.randperm(len(self._ready()[0]), generator=own)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Mean cross entropy of each example's completion, nats a token, (B,), and the outputs."""
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        )
        labels = batch["labels"]
        at = labels != IGNORED
        each = F.cross_entropy(outputs.logits[at].float(), labels[at], reduction="none")
        count = batch["count"]
        sums = torch.zeros(count.shape[0], dtype=each.dtype, device=each.device)
        sums = sums.index_add(0, batch["owner"][at], each)
        return sums / count.clamp(min=1), outputs

    def documents(self, model: nn.Module) -> dict[str, Tensor]:
        """The loss of each held-out example, by source: (n,) float64 each, on the CPU."""
        held, size = self._ready()[1], self.options.eval_batch
        return scores.by_domain(model, self.losses, held, self.domains, size)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The held-out loss: the sources' mean, and each source's."""
        return scores.means(self.metric, self.documents(model))

    def references(self) -> dict[str, dict[str, float]]:
        """Held-out losses of counts of the completions' tokens, by source and ``"mean"``."""
        train, held = self._ready()
        return reference.references(train, held, self.domains, self.tokens.size)

    def export(self, model: nn.Module, path: Path) -> None:
        """Write a model without experts as transformers reads it, whole or not at all."""
        causal.export(model, path)

    def load(self, path: Path) -> nn.Module:
        """What ``export`` wrote, in evaluation mode. Raises RequestError if it cannot be read."""
        return causal.exported(path)

    def page(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """A table of sources, and an example of each with what the model says of it."""
        train, held = self._ready()
        counts = torch.bincount(train.source, minlength=len(self.domains)).tolist()
        rows_, samples = [], []
        each = self.documents(model)
        for place, name in enumerate(self.domains):
            example = int((held.source == place).nonzero()[0])
            a, b = held.ends[example : example + 2].tolist()
            asked = self.tokens.text(held.ids[a:b][~held.learnt[a:b]].tolist())
            told = self._continued(model, held.ids[a:b], held.learnt[a:b])
            samples.append({"domain": name, "prompt": asked[-_SHOWN:], "text": told})
            loss = float(each[name].mean())
            rows_.append([name, f"{counts[place]:,}", f"{loss:.3f}", f"{math.exp(loss):.2f}"])
        return {
            "samples": samples,
            "passages": [],
            "tables": [
                {
                    "title": "Sources",
                    "about": "Training examples, and the loss of held-out completions.",
                    "head": ["source", "examples", "completion loss", "perplexity"],
                    "rows": rows_,
                    "words": 1,
                }
            ],
        }

    def _continued(self, model: nn.Module, ids: Tensor, learnt: Tensor) -> str:
        """The likeliest completion, of as many tokens as the true one at most."""
        first = int(learnt.nonzero()[0])
        row, room = ids[None, :first].clone(), len(ids) - first
        device = causal.device_of(model)
        with evaluating(model):
            for _ in range(min(room, 48)):
                logits = model(input_ids=row.to(device), use_cache=False).logits
                row = torch.cat((row, logits[:, -1:].argmax(-1).cpu()), dim=1)
                if isinstance(self.tokens, ByteTokens) and int(row[0, -1]) >= ByteTokens.size - 1:
                    break
        return self.tokens.text(row[0, first:].tolist())

    def show(self, model: nn.Module, index: Sequence[int]) -> list[dict[str, str]]:
        """Training examples as text: {"text", "caption": the source}."""
        train = self._ready()[0]
        found = []
        for number in index:
            a, b = train.ends[number : number + 2].tolist()
            text = self.tokens.text(train.ids[a:b].tolist())[:_SHOWN]
            found.append({"text": text, "caption": self.domains[int(train.source[number])]})
        return found

    def read(self, model: nn.Module, passage: dict[str, Any]) -> None:
        """Run the model over a passage's tokens."""
        with evaluating(model):
            model(input_ids=torch.tensor([passage["ids"]]), use_cache=False)


def _numbered(name: str, given: list[Any]) -> list[tuple[str, Any]]:
    return [(f"example {i} of {name}", row) for i, row in enumerate(given)]


def _spread(given: list[Any], most: int | None) -> list[Any]:
    """At most so many, spread evenly."""
    if most is None or len(given) <= most:
        return given
    return [given[i * len(given) // most] for i in range(most)]
