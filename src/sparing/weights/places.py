"""Where adapters of each kind go: blocks recognised by their structure, and targets by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn

from sparing.core.errors import RequestError, nearest
from sparing.weights.adapter import CHILD
from sparing.weights.lora import sizes

KINDS: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "houlsby": ("bottleneck",),
    "pfeiffer": ("bottleneck",),
    "parallel": ("bottleneck",),
    "prefix": ("prefix",),
    "mam": ("prefix", "bottleneck"),
}
"""The kinds of adapters, each with what it is made of."""

HEADS = ("classifier", "score", "qa_outputs")
"""Names that transformers gives to heads which no pretrained file has weights for."""

_QUERY_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("qkv",),
    ("Wqkv",),
)


@final
@dataclass(frozen=True, slots=True)
class Spot:
    """One place: the module's name, what stands there, and the sizes (in, out) it works on."""

    path: str
    kind: str
    sizes: tuple[int, int]


@final
@dataclass(frozen=True, slots=True)
class Block:
    """One transformer layer: its attention, and the spots of each kind of bottleneck."""

    path: str
    attention: str
    houlsby: tuple[Spot, ...]
    pfeiffer: tuple[Spot, ...]
    parallel: tuple[Spot, ...]

    def spots(self, kind: str) -> tuple[Spot, ...]:
        """Of a kind of adapter; Mix-and-Match has parallel ones."""
        by_kind = {"houlsby": self.houlsby, "pfeiffer": self.pfeiffer}
        return by_kind.get(kind, self.parallel)


@final
@dataclass(frozen=True, slots=True)
class Family:
    """What a transformer layer of one build consists of, by the names of modules below it.

    ``has``: modules that tell it. ``out``: a linear layer that gives the layer's own size.
    ``houlsby`` names the two places of sequential bottlenecks, ``pfeiffer`` and ``parallel`` a
    place and the kind of bottleneck that stands there; "" is the layer itself.
    """

    has: tuple[str, ...]
    attention: str
    out: str
    houlsby: tuple[str, str]
    pfeiffer: tuple[str, str]
    parallel: tuple[str, str]


def _residual(attention: str, out: str, after: str) -> Family:
    return Family(
        has=("mlp", f"{attention}.{after}"),
        attention=attention,
        out=f"{attention}.{out}",
        houlsby=(f"{attention}.{after}", "mlp"),
        pfeiffer=("", "sequential"),
        parallel=("mlp", "parallel"),
    )


FAMILIES: tuple[Family, ...] = (
    # BERT, RoBERTa, ELECTRA, MiniLM: norms after each residual, feed-forward in two modules
    Family(
        has=(
            "attention.output.LayerNorm",
            "attention.output.dropout",
            "intermediate",
            "output.LayerNorm",
            "output.dropout",
        ),
        attention="attention.self",
        out="output.dense",
        houlsby=("attention.output.dropout", "output.dropout"),
        pfeiffer=("output.LayerNorm", "inside-norm"),
        parallel=("output", "parallel-residual"),
    ),
    # DistilBERT: norms after each residual, feed-forward in one module
    Family(
        has=("ffn", "output_layer_norm"),
        attention="attention",
        out="attention.out_lin",
        houlsby=("attention.out_lin", "ffn"),
        pfeiffer=("output_layer_norm", "inside-norm"),
        parallel=("ffn", "parallel"),
    ),
    # LLaMA, Qwen, Mistral, GPT-2, ViT: norms inside of the residuals, a module ``mlp``
    *(
        _residual(attention, out, after)
        for attention in ("self_attn", "attn", "attention")
        for out in ("o_proj", "out_proj", "c_proj", "out_lin", "proj", "dense")
        for after in ("resid_dropout", out)
    ),
)
"""Tried in this order."""


def blocks(model: nn.Module) -> list[Block]:
    """The transformer layers of a model that are of a known family, in order."""
    modules = own_modules(model)
    found = []
    for path in modules:
        known = (_block(modules, path, family) for family in FAMILIES)
        block = next((block for block in known if block is not None), None)
        if block is not None:
            found.append(block)
    return found


def _block(modules: Mapping[str, nn.Module], path: str, family: Family) -> Block | None:
    """The layer at ``path`` as one of the family, None if it is not."""
    if any(_join(path, name) not in modules for name in (*family.has, family.attention)):
        return None
    known = _sizes(modules.get(_join(path, family.out)))
    if known is None:
        return None
    dims = (known[1], known[1])

    def spot(name: str, kind: str) -> Spot:
        return Spot(_join(path, name), kind, dims)

    houlsby = tuple(spot(name, "sequential") for name in family.houlsby)
    pfeiffer, parallel = (spot(*family.pfeiffer),), (spot(*family.parallel),)
    # a container calls its children one after the other: nothing can be attached to it
    if any(isinstance(modules[s.path], nn.Sequential) for s in (*houlsby, *pfeiffer, *parallel)):
        return None
    return Block(path, _join(path, family.attention), houlsby, pfeiffer, parallel)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the base by name, without adapters."""
    return {path: module for path, module in model.named_modules() if CHILD not in path.split(".")}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of one weight matrix by name.

    Without those of a class that is only read, never called: attention of torch multiplies by
    ``out_proj.weight`` itself, so that whatever is attached to it would never act.
    """
    found = {}
    for path, module in own_modules(model).items():
        only_read = type(module).__name__ == "NonDynamicallyQuantizableLinear"
        if sizes(module) is not None and not only_read:
            found[path] = module
    return found


def lora_targets(model: nn.Module, targets: str | Iterable[str] | None) -> list[str]:
    """The linear layers to adapt, by name.

    None: query and value projections of known transformer layers; on other models, all linear
    layers. Raises RequestError if there are none, and says what there is.
    """
    linear = linear_layers(model)
    if targets is None:
        found = [
            _join(block.attention, name)
            for block in blocks(model)
            for name in _queries(model, block.attention)
        ]
        if not found and not hasattr(model, "config"):
            found = list(linear)
    elif targets == "all-linear":
        output = _output_embeddings(model)
        found = [path for path, module in linear.items() if module is not output]
    else:
        return matching(targets, linear, "linear layers")
    if not found:
        looked = "linear layers" if targets else "query and value projections of attention layers"
        raise RequestError(
            f"there is nothing to adapt: looked for {looked}; {what_there_is(model)}"
        )
    return found


def bottleneck_spots(
    model: nn.Module, kind: str, targets: str | Iterable[str] | None
) -> list[Spot]:
    """Where bottlenecks of a kind go; with ``targets``, around the modules that they name.

    Raises RequestError if there is no place, and says what there is.
    """
    if targets is None:
        found = [spot for block in blocks(model) for spot in block.spots(kind)]
        if not found:
            raise RequestError(
                f"there is nothing to adapt by {kind}: looked for transformer layers built as "
                f"those of BERT, DistilBERT, GPT-2, LLaMA or ViT; {what_there_is(model)}; "
                f"name modules by targets=[...]"
            )
        return found
    beside: Literal["parallel", "sequential"] = (
        "parallel" if kind in ("parallel", "mam") else "sequential"
    )
    known = {}
    for path, module in own_modules(model).items():
        dims = _sizes(module) or _norm_size(module)
        if dims is not None:
            known[path] = dims
    names = list(linear_layers(model)) if targets == "all-linear" else None
    spots = []
    for path in names or matching(targets, known, "linear layers and norms"):
        into, out = known[path]
        spots.append(Spot(path, beside, (into if beside == "parallel" else out, out)))
    return spots


def attention_layers(model: nn.Module, targets: str | Iterable[str] | None) -> list[str]:
    """The attention layers that take a prefix. Raises RequestError if there are none."""
    modules = own_modules(model)
    found = [block.attention for block in blocks(model)]
    if targets is not None and targets != "all-linear":
        return matching(targets, dict.fromkeys(found), "attention layers")
    found = [path for path in found if hasattr(modules[path], "config")]
    if not found:
        raise RequestError(
            f"there is nothing to put a prefix in: looked for attention layers of transformers; "
            f"{what_there_is(model)}"
        )
    return found


def matching(targets: str | Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """Names that a regular expression matches as a whole, or that a list names.

    A name in a list matches itself and whatever ends with it after a dot, as in PEFT; a lone
    string does so too. Raises RequestError for whatever matches nothing.
    """
    names = list(known)
    if isinstance(targets, str):
        try:
            expression = re.compile(targets)
        except re.error as error:
            raise RequestError(f'targets "{targets}" is no regular expression: {error}') from error
        found = [n for n in names if expression.fullmatch(n) or n.endswith(f".{targets}")]
        wanted = [] if found else [targets]
    else:
        wanted, seen = [], set()
        for target in targets:
            hits = {n for n in names if n == target or n.endswith(f".{target}")}
            if not hits:
                wanted.append(target)
            seen |= hits
        found = [n for n in names if n in seen]
    if wanted:
        ends = sorted({n.rpartition(".")[2] or n for n in names})
        raise RequestError(
            f'targets "{wanted[0]}" matches none of the {len(names)} {what}; '
            f"{nearest(wanted[0], ends)}"
        )
    return found


def heads(model: nn.Module, train_also: Iterable[str] | None) -> list[str]:
    """Modules of the base that are trained too; None: a new head of a transformers model."""
    modules = own_modules(model)
    if train_also is None:
        return [name for name in HEADS if name in modules and hasattr(model, "config")]
    trainable = [p for p, m in modules.items() if p and next(m.parameters(), None) is not None]
    return matching(list(train_also), trainable, "modules with parameters")


def what_there_is(model: nn.Module) -> str:
    """The kinds of modules in a model, for messages."""
    count: dict[str, int] = {}
    for module in own_modules(model).values():
        if next(module.parameters(recurse=False), None) is not None:
            count[type(module).__name__] = count.get(type(module).__name__, 0) + 1
    shown = ", ".join(f"{n} {name}" for name, n in sorted(count.items(), key=lambda c: -c[1])[:8])
    return f"the model has {shown}" if shown else "the model has no parameters"


def _queries(model: nn.Module, attention: str) -> tuple[str, ...]:
    module = model.get_submodule(attention)
    for names in _QUERY_VALUE:
        if all(_sizes(_part(module, name)) is not None for name in names):
            return names
    return ()


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _norm_size(module: nn.Module) -> tuple[int, int] | None:
    weight = getattr(module, "weight", None)
    if "Norm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    if "BatchNorm" in type(module).__name__ or "GroupNorm" in type(module).__name__:
        return None  # their features are not on the last axis
    return int(weight.shape[0]), int(weight.shape[0])


def _sizes(module: nn.Module | None) -> tuple[int, int] | None:
    return None if module is None else sizes(module)


def _part(module: nn.Module | None, name: str) -> nn.Module | None:
    found = None if module is None else module._modules.get(name)
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
