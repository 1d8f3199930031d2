"""How a converted model is laid out on disk, and which models can be laid out how."""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from sparing.convert.checkpoint import INDEX, SINGLE, Source
from sparing.convert.options import Conversion
from sparing.convert.pieces import Decision, Pieces
from sparing.convert.skeleton import Skeleton
from sparing.convert.writing import Entry, index_of
from sparing.core.state import atomic_write_json
from sparing.experts.families import Block

LAYER = re.compile(r"model\.layers\.(\d+)\.mlp")
SHARED_LEAST = 8
"""Hidden units of a shared expert of zeros, where the layout has to have one."""


Files = Mapping[str, list[Entry]]
"""The tensors to write, by file."""
Written = Mapping[str, dict[str, Any]]
"""What was written of each file: its size and SHA-256."""


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a form lays out: where tensors come from, what was decided, and the options."""

    pieces: Pieces
    decisions: Mapping[str, Decision]
    options: Conversion


class Form(abc.ABC):
    """Abstract: the files of a converted model."""

    name: ClassVar[str]
    """As it is noted in the result."""
    loads_with: ClassVar[str]

    @abc.abstractmethod
    def files(self, asked: Asked) -> Files:
        """The tensors to write, by file."""

    @abc.abstractmethod
    def finish(self, asked: Asked, folder: Path, files: Files, written: Written) -> None:
        """Write what stands beside the weights; written: sizes and sums of what ``files`` told."""

    @abc.abstractmethod
    def stored(self, source: Source, path: str, part: str) -> Tensor:
        """A part of all routed experts as it lies in the result, (E, ...)."""

    @abc.abstractmethod
    def always(self, source: Source, path: str, part: str) -> Tensor | None:
        """That of the units that are always on, with what was folded into it undone; or None."""

    @abc.abstractmethod
    def belongs(self, name: str, path: str) -> bool:
        """Whether the tensor ``name`` of the result belongs to the block that stood at ``path``."""


class Exported(Form, abc.ABC):
    """Abstract: a model that plain transformers loads; the files are cut as the source's are."""

    loads_with: ClassVar[str] = "transformers.AutoModelForCausalLM"
    architecture: ClassVar[str]
    block: ClassVar[str]
    experts: ClassVar[Mapping[str, str]]
    has_shared: ClassVar[bool] = False

    @staticmethod
    @abc.abstractmethod
    def refuses(skeleton: Skeleton, options: Conversion) -> str | None:
        """Why the model cannot be laid out so, or None if it can."""

    @abc.abstractmethod
    def config(
        self, skeleton: Skeleton, width: int, shared: int, options: Conversion, dense: list[int]
    ) -> dict[str, Any]:
        """What differs from the dense model's configuration; dense: layers that stay."""

    def files(self, asked: Asked) -> Files:
        pieces, decisions, skeleton = asked.pieces, asked.decisions, asked.pieces.skeleton
        by_source = {theirs: name for name, theirs in skeleton.names.items()}
        owner = {
            skeleton.names[name]: (block, part)
            for block in skeleton.blocks
            if block.path in decisions
            for part, name in skeleton.parts(block).items()
        }
        listed = [[name for name in held if name in by_source] for held in skeleton.source.files()]
        listed = [held for held in listed if held]
        count = len(listed)
        files: dict[str, list[Entry]] = {}
        for number, held in enumerate(listed, 1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            entries: list[Entry] = []
            for theirs in held:
                if theirs in owner:
                    block, part = owner[theirs]
                    entries += self._block(pieces, block, part, decisions[block.path])
                else:
                    entries.append(copied(skeleton, by_source[theirs], theirs))
            files[file] = entries
        return files

    def _block(self, pieces: Pieces, block: Block, part: str, decision: Decision) -> list[Entry]:
        layer, dtype = f"{layer_of(block.path)}", pieces.skeleton.dtype(block)
        count, width = decision.split.index.shape
        shape = (block.dim, width) if part == "down" else (width, block.dim)
        entries = [
            Entry(
                name=f"{layer}.{self.block}.experts.{e}.{self.experts[part]}.weight",
                dtype=dtype,
                shape=shape,
                make=lambda e=e: pieces.expert(block, part, decision, e),  # type: ignore[misc]
            )
            for e in range(count)
        ]
        if part == "down":
            gate = decision.gate
            assert gate is not None
            entries.append(
                Entry(
                    name=f"{layer}.{self.block}.gate.weight",
                    dtype=dtype,
                    shape=(count, block.dim),
                    make=lambda: gate.to(dtype),
                )
            )
        if self.has_shared:
            entries += self._shared(pieces, block, part, decision, f"{layer}.{self.block}", dtype)
        return entries

    def _shared(
        self,
        pieces: Pieces,
        block: Block,
        part: str,
        decision: Decision,
        prefix: str,
        dtype: torch.dtype,
    ) -> list[Entry]:
        size = len(decision.split.shared) or SHARED_LEAST
        shape = (block.dim, size) if part == "down" else (size, block.dim)

        def make() -> Tensor:
            if not len(decision.split.shared):
                return torch.zeros(shape, dtype=dtype)
            # its gate is sigmoid(0), one half
            return pieces.shared(block, part, decision, 2.0)

        entries = [
            Entry(
                name=f"{prefix}.shared_expert.{self.experts[part]}.weight",
                dtype=dtype,
                shape=shape,
                make=make,
            )
        ]
        if part == "down":
            entries.append(
                Entry(
                    name=f"{prefix}.shared_expert_gate.weight",
                    dtype=dtype,
                    shape=(1, block.dim),
                    make=lambda: torch.zeros(1, block.dim, dtype=dtype),
                )
            )
        return entries

    def finish(self, asked: Asked, folder: Path, files: Files, written: Written) -> None:
        skeleton, decisions = asked.pieces.skeleton, asked.decisions
        first = next(iter(decisions.values()))
        dense = [
            int(layer_of(block.path).rpartition(".")[2])
            for block in skeleton.blocks
            if block.path not in decisions
        ]
        shared = len(first.split.shared) or SHARED_LEAST
        body = {
            **plain(skeleton.config),
            **self.config(skeleton, first.split.width, shared, asked.options, dense),
        }
        body["architectures"] = [self.architecture]
        body["model_type"] = self.name
        rope = body.get("rope_parameters") or {}
        if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
            # where versions of transformers before 5, and other readers, look for it
            body["rope_theta"] = rope["rope_theta"]
        atomic_write_json(folder / "config.json", body)
        if len(files) > 1:
            atomic_write_json(folder / INDEX, index_of(files))

    def stored(self, source: Source, path: str, part: str) -> Tensor:
        shapes = source.shapes()
        prefix = f"{layer_of(path)}.{self.block}.experts"
        found: list[Tensor] = []
        while (name := f"{prefix}.{len(found)}.{self.experts[part]}.weight") in shapes:
            found.append(source.read(name))
        return torch.stack(found)

    def always(self, source: Source, path: str, part: str) -> Tensor | None:
        if not self.has_shared:
            return None
        prefix = f"{layer_of(path)}.{self.block}.shared_expert"
        found = source.read(f"{prefix}.{self.experts[part]}.weight")
        return found / 2.0 if part == "down" else found

    def belongs(self, name: str, path: str) -> bool:
        return name.startswith(f"{layer_of(path)}.{self.block}.")


@final
class Mixtral(Exported):
    """Routed experts in all layers, no bias anywhere: LLaMA and Mistral."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    block = "block_sparse_moe"
    experts = {"gate": "w1", "up": "w3", "down": "w2"}  # noqa: RUF012

    @staticmethod
    def refuses(skeleton: Skeleton, options: Conversion) -> str | None:
        kind = skeleton.config.model_type
        if kind not in ("llama", "mistral"):
            return f'Mixtral differs from "{kind}" outside of the feed-forward'
        if getattr(skeleton.config, "attention_bias", False):
            return "Mixtral has no attention biases"
        if options.always:
            return "Mixtral has no shared expert"
        if options.first_dense + options.last_dense:
            return "Mixtral has experts in all layers"
        return None

    def config(
        self, skeleton: Skeleton, width: int, shared: int, options: Conversion, dense: list[int]
    ) -> dict[str, Any]:
        return {
            "intermediate_size": width,
            "num_local_experts": options.routed,
            "num_experts_per_tok": options.chosen,
            "sliding_window": getattr(skeleton.config, "sliding_window", None),
        }


def _qwen(width: int, options: Conversion, dense: list[int]) -> dict[str, Any]:
    """What both generations name alike."""
    return {
        "moe_intermediate_size": width,
        "num_experts": options.routed,
        "num_experts_per_tok": options.chosen,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@final
class Qwen2Moe(Exported):
    """A shared expert beside the routed ones, dense layers where wanted: LLaMA, Mistral, Qwen 2."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    block = "mlp"
    experts = QWEN
    has_shared = True

    @staticmethod
    def refuses(skeleton: Skeleton, options: Conversion) -> str | None:
        config = skeleton.config
        if config.model_type not in ("llama", "mistral", "qwen2"):
            return f'Qwen2-MoE differs from "{config.model_type}" outside of the feed-forward'
        if config.model_type != "qwen2" and getattr(config, "attention_bias", False):
            return "Qwen2-MoE has no bias after attention"
        if config.model_type == "mistral" and getattr(config, "sliding_window", None):
            return "Qwen2-MoE limits attention by layer, Mistral in all of them"
        heads = config.hidden_size // config.num_attention_heads
        if (getattr(config, "head_dim", None) or heads) != heads:
            return "Qwen2-MoE has no head size of its own"
        return None

    def config(
        self, skeleton: Skeleton, width: int, shared: int, options: Conversion, dense: list[int]
    ) -> dict[str, Any]:
        return {
            **_qwen(width, options, dense),
            "shared_expert_intermediate_size": shared,
            "qkv_bias": skeleton.config.model_type == "qwen2",
            "use_sliding_window": bool(getattr(skeleton.config, "use_sliding_window", False)),
        }


@final
class Qwen3Moe(Exported):
    """Routed experts beside normalised queries and keys: Qwen 3."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    block = "mlp"
    experts = QWEN

    @staticmethod
    def refuses(skeleton: Skeleton, options: Conversion) -> str | None:
        config = skeleton.config
        if config.model_type != "qwen3":
            return f'Qwen3-MoE differs from "{config.model_type}" outside of the feed-forward'
        if getattr(config, "use_sliding_window", False):
            return "Qwen3-MoE limits attention in all layers, Qwen 3 in some"
        if options.always:
            return "Qwen3-MoE has no shared expert"
        return None

    def config(
        self, skeleton: Skeleton, width: int, shared: int, options: Conversion, dense: list[int]
    ) -> dict[str, Any]:
        return _qwen(width, options, dense)


EXPORTS: tuple[type[Exported], ...] = (Mixtral, Qwen2Moe, Qwen3Moe)


def copied(skeleton: Skeleton, name: str, theirs: str) -> Entry:
    """A tensor that conversion leaves as it is."""
    return Entry(
        name=name,
        dtype=skeleton.source.dtype(theirs),
        shape=tuple(skeleton.source.shapes()[theirs]),
        make=lambda: skeleton.source.read(theirs),
    )


def layer_of(path: str) -> str:
    """The decoder layer of a block, ``model.layers.3``."""
    return path.rpartition(".")[0]


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON takes it."""
    body: dict[str, Any] = config.to_diff_dict()
    return {**config.to_dict(), **body} | {"transformers_version": None}


def refusals(skeleton: Skeleton, options: Conversion) -> tuple[type[Exported] | None, str]:
    """The layout that plain transformers loads, or None and why there is none."""
    if options.router != "top-k" or options.router_options:
        return None, f'only softmax top-k can be exported, not "{options.router}"'
    if options.compensate != "none":
        return None, "compensation needs expert biases, which these layouts lack"
    for block in skeleton.blocks:
        if not LAYER.fullmatch(block.path) or block.kind != "gated" or block.gate is None:
            return None, f'"{block.path}" is no gated block of a decoder layer'
        if {"up_bias", "down_bias"} & set(skeleton.parts(block)):
            return None, "these layouts have no biases in experts"
    if len({(block.width, skeleton.dtype(block)) for block in skeleton.blocks}) > 1:
        return None, "its blocks differ in width or type"
    reasons = []
    for form in EXPORTS:
        reason = form.refuses(skeleton, options)
        if reason is None:
            return form, ""
        reasons.append(reason)
    return None, "; ".join(reasons)
