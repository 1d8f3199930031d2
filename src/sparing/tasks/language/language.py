"""The task: text in, a small LLaMA, one loss per window, bits per byte out."""

from __future__ import annotations

import math
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
from sparing.tasks import causal, scores
from sparing.tasks.language import corpus, reference
from sparing.tasks.language.dataset import Windows, held_out_windows, passages
from sparing.tasks.language.options import BYTES, LanguageOptions
from sparing.tasks.language.sample import sample
from sparing.tasks.unprepared import Unprepared

_PROMPT_BYTES = 48
_SHOWN_BYTES = 160


@final
class Language:
    """Byte-level language modelling on Shakespeare, GSM8K and Python's standard library.

    Constructed from the keywords of ``LanguageOptions``; an unknown one raises RequestError.
    A sample is a window of ``seq_len`` bytes and its loss is the mean cross entropy, in nats per
    byte. The metric is bits per byte on fixed held-out windows, the mean over the domains.
    """

    name: ClassVar[str] = "language"
    Options: ClassVar[type[Any]] = LanguageOptions
    metric: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False
    model_needs_data: ClassVar[bool] = False
    evaluation: ClassVar[tuple[str, ...]] = ("domains", "split", "seq_len", "eval_windows", "vocab")
    about_metric: ClassVar[str] = (
        "Bits per byte is how many bits the model needs, on average, to store a byte of text that "
        "it has not seen: lower is better, and a model that knows nothing needs 8."
    )

    def __init__(self, **options: Any) -> None:
        require_known("Language", options, LanguageOptions)
        self.options = LanguageOptions(**options)
        self.domains: tuple[str, ...] = self.options.domains
        self.tokens_per_sample: int = self.options.seq_len
        self.fingerprint: str = ""
        self.train: Samples = Unprepared("language")
        self._windows: Windows | None = None
        self._texts: dict[str, corpus.Split] = {}
        self._held_out: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare(self, seed: int) -> None:
        """Load the texts. They and their windows are the same for every ``seed``.

        Raises RequestError if a domain is empty, its sources are missing or it is shorter than
        one window.
        """
        length = self.options.seq_len
        texts = corpus.load(self.domains)
        if self.options.split == "development":
            texts = {name: corpus.development(split) for name, split in texts.items()}
        learnt = {name: split.train for name, split in texts.items()}
        windows = Windows(learnt, length, most=self.options.windows_per_domain)
        self._held_out = {
            name: held_out_windows(name, split.held_out, length, self.options.eval_windows)
            for name, split in texts.items()
        }
        self._texts = texts
        self._windows = windows
        self.train = windows
        self.fingerprint = corpus.fingerprint(texts)

    def _ready(self) -> Windows:
        if self._windows is None:
            raise RequestError("the language task has no data yet; call prepare(seed) first")
        return self._windows

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised ``LlamaForCausalLM``; the global generators stay as they were."""
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = self.options
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.dim,
            intermediate_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads or shape.heads,
            max_position_embeddings=shape.seq_len,
            initializer_range=shape.init_std,
            tie_word_embeddings=shape.tied,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed the accelerators' generators too.
            torch.default_generator.manual_seed(seed)
            model: Any = LlamaForCausalLM(config)
            if shape.embed_std is not None:
                nn.init.normal_(model.get_input_embeddings().weight, std=shape.embed_std)
        if shape.zero_output:
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    nn.init.zeros_(parameter)
        built: nn.Module = model
        return built

    def domain_of(self, index: Tensor) -> Tensor:
        """(B,) int64 -> (B,) int64, positions in ``domains``."""
        return self._ready().domain_of(index)

    def order(self, epoch: int, generator: torch.Generator) -> Tensor:
        """A balanced epoch, see ``Windows.order``; of ``generator`` only the seed counts."""
        return self._ready().order(epoch, generator.initial_seed())

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Mean cross entropy of each window, nats per byte, (B,) float32, and the model's outputs.

        Raises RequestError for a model whose vocabulary or longest sequence does not fit.
        """
        inputs, labels = batch["input_ids"], batch["labels"]  # (B, S)
        self._require_fit(model, inputs.shape[1])
        outputs = model(input_ids=inputs, use_cache=False)
        logits = outputs.logits  # (B, S, V)
        each = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none"
        )  # (B * S,)
        return each.view(labels.shape).mean(dim=1), outputs

    def _require_fit(self, model: nn.Module, length: int) -> None:
        config = getattr(model, "config", None)
        vocab = getattr(config, "vocab_size", BYTES)
        longest = getattr(config, "max_position_embeddings", length)
        if vocab < BYTES:
            raise RequestError(
                f"the model's vocabulary of {vocab} does not fit: bytes need {BYTES}"
            )
        if longest < length:
            raise RequestError(
                f"seq_len {length} does not fit: the model takes at most {longest} positions"
            )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over fixed held-out windows: the domains' mean and each domain's.

        Every window is scored from its first byte on, without the text before it. Modes and
        generators are left as they were.
        """
        return scores.means(self.metric, self.documents(model))

    def documents(self, model: nn.Module) -> dict[str, Tensor]:
        """Bits per byte of each held-out window, by domain: (n,) float64 each, on the CPU."""
        self._ready()
        device = causal.device_of(model)
        found: dict[str, Tensor] = {}
        with evaluating(model):
            for name, (_, windows) in self._held_out.items():
                parts = []
                for part in torch.split(windows, self.options.eval_batch):
                    piece = part.to(device)
                    batch = {"input_ids": piece[:, :-1], "labels": piece[:, 1:]}
                    parts.append(self.losses(model, batch)[0].double().cpu())
                found[name] = torch.cat(parts) / math.log(2)
        return found

    def export(self, model: nn.Module, path: Path) -> None:
        """Write a model without experts as transformers reads it, whole or not at all."""
        causal.export(model, path)

    def load(self, path: Path) -> nn.Module:
        """What ``export`` wrote, in evaluation mode. Raises RequestError if it cannot be read."""
        return causal.exported(path)

    def references(self) -> dict[str, dict[str, float]]:
        """Bits per byte of 5-gram models and xz, by domain and ``"mean"``; see ``reference``."""
        self._ready()
        scored = {name: starts.numpy() for name, (starts, _) in self._held_out.items()}
        return reference.references(self._texts, scored, self.options.seq_len, self.fingerprint)

    def page(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """``samples`` [{domain, prompt, text}] and ``passages`` [{domain, bytes}], held out.

        Samples continue a prompt of held-out text at temperature 0.8, at most as long as a
        training window. A passage may be longer than one: annotate it in pieces of ``seq_len``.
        """
        self._ready()
        held_out = [self._texts[name].held_out for name in self.domains]
        size = min(_PROMPT_BYTES, max(1, self.options.seq_len // 4))
        prompts = [text[:size] for text in passages(held_out, self.options.seq_len)]
        drawn = sample(
            model,
            torch.tensor([list(prompt) for prompt in prompts]),
            min(self.options.sample_bytes, self.options.seq_len - size),
            seed=seed,
        )
        return {
            "samples": [
                {
                    "domain": name,
                    "prompt": prompt.decode("utf-8", "replace"),
                    "text": bytes(row).decode("utf-8", "replace"),
                }
                for name, prompt, row in zip(self.domains, prompts, drawn.tolist(), strict=True)
            ],
            "passages": [
                {"domain": name, "bytes": list(text)}
                for name, text in zip(
                    self.domains, passages(held_out, self.options.passage_bytes), strict=True
                )
            ],
        }

    def show(self, model: nn.Module, index: Sequence[int]) -> list[dict[str, str]]:
        """The beginnings of training windows: {"text", "caption": the domain}."""
        if not len(index):
            return []
        chosen = torch.tensor(list(index), dtype=torch.int64)
        texts = self._ready().batch(chosen)["input_ids"][:, :_SHOWN_BYTES].tolist()
        return [
            {"text": bytes(row).decode("utf-8", "replace"), "caption": self.domains[domain]}
            for row, domain in zip(texts, self.domain_of(chosen).tolist(), strict=True)
        ]

    def read(self, model: nn.Module, passage: dict[str, Any]) -> None:
        """Run the model over the passage's bytes, in pieces of ``seq_len``."""
        text = torch.tensor([passage["bytes"]], device=causal.device_of(model))  # (1, n)
        with evaluating(model):
            for piece in torch.split(text, self.options.seq_len, dim=1):
                model(input_ids=piece, use_cache=False)
