"""The layout that ``sparing.load`` reads: for every model, router and compensation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from sparing.convert.checkpoint import Source
from sparing.convert.forms import Asked, Files, Form, Written, copied
from sparing.convert.options import Conversion
from sparing.convert.pieces import STRIDE, Decision, Pieces
from sparing.convert.skeleton import Skeleton
from sparing.convert.writing import Entry
from sparing.core import registry
from sparing.core.errors import RequestError
from sparing.core.state import atomic_write_json
from sparing.experts.families import FAMILIES, Block
from sparing.experts.layer import ExpertLayer
from sparing.experts.method import RoutedExperts
from sparing.experts.moefy import place_
from sparing.experts.router import Router
from sparing.experts.storage import FORMAT, NOTE, WEIGHTS


@final
class Native(Form):
    """One file of weights with stacked experts, and ``sparing.json``."""

    name = "sparing"
    loads_with = "sparing.load"

    def files(self, asked: Asked) -> Files:
        pieces, decisions, options = asked.pieces, asked.decisions, asked.options
        skeleton = pieces.skeleton
        method = method_of(options, decisions)
        model = surgery(skeleton, method, decisions, options)
        blocks = {block.path: block for block in skeleton.blocks}
        order = [path for path, m in model.named_modules() if isinstance(m, ExpertLayer)]
        entries: list[Entry] = []
        for name, tensor in model.state_dict(keep_vars=True).items():
            path = next((p for p in order if name.startswith(f"{p}.")), None)
            if path is None:
                if name not in skeleton.aliases:
                    entries.append(copied(skeleton, name, skeleton.names[name]))
                continue
            inner = name[len(path) + 1 :]
            maker = _Maker(
                pieces=pieces,
                block=blocks[path],
                decision=decisions[path],
                router=lambda path=path: method.router(  # type: ignore[misc]
                    blocks[path].dim, router_seed(skeleton, path, options)
                ),
            )
            entries.append(maker.entry(inner, tensor))
        return {WEIGHTS: entries}

    def finish(self, asked: Asked, folder: Path, files: Files, written: Written) -> None:
        import transformers

        skeleton, decisions, options = asked.pieces.skeleton, asked.decisions, asked.options
        model = surgery(skeleton, method_of(options, decisions), decisions, options)
        surgeries = vars(model)["sparing"]["surgeries"]
        newer = any("bias" in made or "family" in made for made in surgeries)
        skeleton.config.save_pretrained(folder)
        note = {
            "format": FORMAT if newer else 1,
            "class": skeleton.class_name,
            "transformers": transformers.__version__,
            "attention": skeleton.config._attn_implementation or "sdpa",
            "surgeries": surgeries,
            "aliases": dict(skeleton.aliases),
            "weights": written[WEIGHTS],
        }
        atomic_write_json(folder / NOTE, note)

    def stored(self, source: Source, path: str, part: str) -> Tensor:
        return source.read(f"{path}.experts.{part}")

    def always(self, source: Source, path: str, part: str) -> Tensor | None:
        name = f"{path}.always.shared.{part}"
        return source.read(name)[0] if name in source.shapes() else None

    def belongs(self, name: str, path: str) -> bool:
        return name.startswith(f"{path}.")


def method_of(
    options: Conversion, decisions: Mapping[str, Decision] | None = None
) -> RoutedExperts:
    """The routed method that the options name, with as many experts and choices as they say.

    Raises RequestError if it routes nothing or cannot have these options.
    """
    found = registry.method(options.router)
    if not issubclass(found, RoutedExperts):
        raise RequestError(
            f'"{options.router}" routes to no experts; give a router such as top-k or dynmoe'
        )
    known = {field.name for field in dataclasses.fields(found.Options)}
    wanted: dict[str, Any] = {"experts": options.routed, "max_experts": options.routed}
    wanted |= {"k": options.chosen, "start_k": float(options.chosen), "normalize": True}
    given = {name: value for name, value in wanted.items() if name in known}
    shared = max((len(d.split.shared) for d in (decisions or {}).values()), default=0)
    if shared:
        given |= {"shared": 1, "shared_width": shared}
    made: RoutedExperts = found(**{**given, **options.router_options})
    return made


def surgery(
    skeleton: Skeleton,
    method: RoutedExperts,
    decisions: Mapping[str, Decision],
    options: Conversion,
) -> Any:
    """The converted model on the meta device."""
    return place_(
        copy.deepcopy(skeleton.model),
        method,
        {path: decision.split.width for path, decision in decisions.items()},
        experts="empty",
        seed=options.seed,
        bias=options.compensate != "none",
        families=skeleton.families if skeleton.families[0] is not FAMILIES[0] else FAMILIES,
    )


def router_seed(skeleton: Skeleton, path: str, options: Conversion) -> int:
    """The seed of the router that ``place_`` makes for a block."""
    position = [block.path for block in skeleton.blocks].index(path)
    return options.seed * STRIDE + position


@final
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Maker:
    """Makes the tensors of one expert layer by their names within it."""

    pieces: Pieces
    block: Block
    decision: Decision
    router: Callable[[], Router]

    def entry(self, inner: str, tensor: Tensor) -> Entry:
        head, _, part = inner.rpartition(".")
        expert = head in ("experts", "always.shared")
        dtype = self.pieces.skeleton.dtype(self.block) if expert else tensor.dtype
        shape = tuple(tensor.shape)

        def make() -> Tensor:
            if head == "experts":
                return self.pieces.routed(self.block, part, self.decision)
            if head == "always.shared":
                if part not in self.pieces.skeleton.dense_parts(self.block):
                    return torch.zeros(shape, dtype=dtype)
                return self.pieces.shared(self.block, part, self.decision)[None]
            if inner == "router.similarity" and self.decision.gate is not None:
                return self.decision.gate.to(dtype)
            if inner.startswith("router."):
                own: Tensor = self.router().state_dict()[inner.removeprefix("router.")]
                return own
            return torch.zeros(shape, dtype=dtype)

        return Entry(name=f"{self.block.path}.{inner}", dtype=dtype, shape=shape, make=make)
