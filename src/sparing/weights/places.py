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
_ATTENTION = ("self_attn", "attn", "attention")
_OUT = ("o_proj", "out_proj", "c_proj", "out_lin", "proj", "dense")


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


def blocks(model: nn.Module) -> list[Block]:
    """The transformer layers of a model that are of a known structure, in order."""
    found = []
    for path, module in own_modules(model).items():
        block = _bert(path, module) or _distilbert(path, module) or _residual(path, module)
        if block is not None:
            found.append(block)
    return found


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of the base by name, without adapters."""
    return {path: module for path, module in model.named_modules() if CHILD not in path.split(".")}


def _bert(path: str, layer: nn.Module) -> Block | None:
    """BERT, RoBERTa, ELECTRA, MiniLM: norms after each residual, feed-forward in two modules."""
    attention, output = _part(layer, "attention"), _part(layer, "output")
    first, inner = _part(attention, "output"), _part(attention, "self")
    split = _part(layer, "intermediate")
    dense = _part(output, "dense")
    if None in (first, inner, split) or not isinstance(dense, nn.Linear):
        return None
    if not all(_part(part, name) for part in (first, output) for name in ("LayerNorm", "dropout")):
        return None
    dim = dense.out_features
    return Block(
        path=path,
        attention=_join(path, "attention.self"),
        houlsby=tuple(
            Spot(_join(path, place), "sequential", (dim, dim))
            for place in ("attention.output.dropout", "output.dropout")
        ),
        pfeiffer=(Spot(_join(path, "output.LayerNorm"), "inside-norm", (dim, dim)),),
        parallel=(Spot(_join(path, "output"), "parallel-residual", (dim, dim)),),
    )


def _distilbert(path: str, layer: nn.Module) -> Block | None:
    """DistilBERT: norms after each residual, feed-forward in one module."""
    attention, ffn = _part(layer, "attention"), _part(layer, "ffn")
    out = _part(attention, "out_lin")
    if ffn is None or _part(layer, "output_layer_norm") is None or not isinstance(out, nn.Linear):
        return None
    dim = out.out_features
    return Block(
        path=path,
        attention=_join(path, "attention"),
        houlsby=tuple(
            Spot(_join(path, place), "sequential", (dim, dim))
            for place in ("attention.out_lin", "ffn")
        ),
        pfeiffer=(Spot(_join(path, "output_layer_norm"), "inside-norm", (dim, dim)),),
        parallel=(Spot(_join(path, "ffn"), "parallel", (dim, dim)),),
    )


def _residual(path: str, layer: nn.Module) -> Block | None:
    """LLaMA, Qwen, Mistral, GPT-2, ViT: norms inside of the residuals, a module ``mlp``."""
    mlp = _part(layer, "mlp")
    name = next((name for name in _ATTENTION if _part(layer, name) is not None), None)
    if mlp is None or name is None or isinstance(mlp, nn.Sequential):
        return None
    attention = _part(layer, name)
    out = next((part for part in _OUT if _sizes(_part(attention, part)) is not None), None)
    if out is None:
        return None
    known = _sizes(_part(attention, out))
    assert known is not None
    dim = known[1]
    after = "resid_dropout" if _part(attention, "resid_dropout") is not None else out
    return Block(
        path=path,
        attention=_join(path, name),
        houlsby=tuple(
            Spot(_join(path, place), "sequential", (dim, dim))
            for place in (f"{name}.{after}", "mlp")
        ),
        pfeiffer=(Spot(path, "sequential", (dim, dim)),),
        parallel=(Spot(_join(path, "mlp"), "parallel", (dim, dim)),),
    )


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
    return f"{path}.{name}" if path else name
