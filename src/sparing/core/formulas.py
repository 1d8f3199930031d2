"""How many floating point operations a module's call takes, as a list of matrix products.

One of F FLOPs (a multiply and an add are two) costs F forward, and in backward F once for each of
its operands that needs a gradient: twice in a plain dense layer, once where the weight is frozen
or nothing before it is trained, not at all where both hold. Products only: norms, activations,
softmax, embeddings and the optimizer count nothing, as in ``torch.utils.flop_counter``.

Attention counts its full square of queries and keys, causal or not, once per query head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from sparing.core.errors import RequestError


@final
@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product: ``flops`` forward, and ``grads`` of its operands need a gradient."""

    flops: int
    grads: int


@final
@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module, as its formula sees it: shapes and flags are read, never values."""

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def x(self) -> Tensor:
        """The first tensor that the module was given."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise RequestError(f"{type(self.module).__name__} was called without a tensor")


Formula = Callable[[Call], Sequence[Product]]


def matmul_flops(m: int, k: int, n: int) -> int:
    """FLOPs of (m, k) @ (k, n): a multiply and an add for each of m * k * n."""
    return 2 * m * k * n


_FORMULAS: dict[type[nn.Module] | str, Formula] = {}


def register(module_type: type[nn.Module] | str, formula: Formula) -> None:
    """Give a module type, and its subclasses without an own one, a formula.

    A type that is not to be imported is named: ``"transformers.pytorch_utils.Conv1D"``. For the
    work of a whole block give the formula to the block and none to its parts: both would count.
    """
    _FORMULAS[module_type] = formula


def costs_nothing(call: Call) -> list[Product]:
    """The formula of embeddings and norms."""
    return []


def _linear(call: Call) -> list[Product]:
    module, x = call.module, call.x
    # by the declared width: a quantised weight's shape says something else
    rows = x.numel() // module.in_features
    flops = matmul_flops(rows, module.in_features, module.out_features)
    return [Product(flops, x.requires_grad + module.weight.requires_grad)]


def _transposed_linear(call: Call) -> list[Product]:
    weight, x = call.module.weight, call.x
    width, out = weight.shape
    flops = matmul_flops(x.numel() // width, width, out)
    return [Product(flops, x.requires_grad + weight.requires_grad)]


def _convolution(call: Call) -> list[Product]:
    module, x = call.module, call.x
    # every position of the output (of the input, if transposed) meets the whole kernel once
    positions = x if module.transposed else call.output
    batch, spatial = positions.shape[0], positions.shape[2:]
    if positions.ndim == module.weight.ndim - 1:  # without a batch axis
        batch, spatial = 1, positions.shape[1:]
    flops = 2 * batch * math.prod(spatial) * module.weight.numel()
    return [Product(flops, x.requires_grad + module.weight.requires_grad)]


def _torch_attention(call: Call) -> list[Product]:
    """``nn.MultiheadAttention`` works on its own weights: projections and products in one."""
    module = call.module
    given = dict(zip(("query", "key", "value"), call.args, strict=False)) | dict(call.kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    axis = 1 if module.batch_first and query.ndim == 3 else 0
    dim, out = module.embed_dim, module.out_proj.weight
    one = module.in_proj_weight
    weights = (
        (one,) * 3
        if one is not None
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    products, needs = [], []
    for tensor, weight in zip((query, key, value), weights, strict=True):
        width = tensor.shape[-1]
        flops = matmul_flops(tensor.numel() // width, width, dim)
        products.append(Product(flops, tensor.requires_grad + weight.requires_grad))
        needs.append(tensor.requires_grad or weight.requires_grad)
    rows = query.numel() // query.shape[-1]
    products += _scores(rows, key.shape[axis], dim, dim, needs[0], needs[1], needs[2])
    flops = matmul_flops(rows, dim, dim)
    return [*products, Product(flops, any(needs) + out.requires_grad)]


def _scores(
    rows: int, keys: int, score_dim: int, value_dim: int, q: bool, k: bool, v: bool
) -> list[Product]:
    """Queries times keys, then probabilities times values; dims are summed over heads."""
    return [
        Product(matmul_flops(rows, score_dim, keys), q + k),
        Product(matmul_flops(rows, keys, value_dim), (q or k) + v),
    ]


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_HEAD_DIMS = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")
_FUSED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "in_proj")
_QUERY = ("q_proj", "query", "q", "q_lin", "q_attn", "q_a_proj", "q_b_proj", *_FUSED)
_KEY = ("k_proj", "key", "k", "k_lin", "kv_a_proj_with_mqa", "kv_b_proj", *_FUSED)
_VALUE = ("v_proj", "value", "v", "v_lin", "kv_a_proj_with_mqa", "kv_b_proj", *_FUSED)


def _first(module: nn.Module, names: Sequence[str]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _head_shape(module: nn.Module) -> tuple[int, int] | None:
    """(heads, dimension of one) of an attention block as model libraries write them, else None.

    Recognised by its class name and its attributes, since libraries share no base class; its
    projections are modules of their own and counted as such.
    """
    if not type(module).__name__.endswith("Attention"):
        return None
    heads, dim = _first(module, _HEADS), _first(module, _HEAD_DIMS)
    config = getattr(module, "config", None)
    if heads is None and dim is not None and config is not None:
        heads = getattr(config, "num_attention_heads", None)
    if heads is not None and dim is None:
        width = _first(module, ("embed_dim", "hidden_size", "dim", "all_head_size"))
        dim = None if width is None else width // heads
    return None if heads is None or dim is None else (heads, dim)


def _attention(call: Call) -> list[Product]:
    module = call.module
    shape = _head_shape(module)
    if shape is None:
        raise RequestError(f"{type(module).__name__} does not tell its heads")
    heads, dim = shape
    x = call.kwargs.get("hidden_states", None)
    x = call.x if x is None else x
    source = next(
        (
            call.kwargs[name]
            for name in ("encoder_hidden_states", "key_value_states")
            if call.kwargs.get(name) is not None
        ),
        x,
    )
    keys = source.shape[-2]
    cache = call.kwargs.get("past_key_values")
    if cache is not None and source is x and hasattr(cache, "get_seq_length"):
        keys = max(keys, int(cache.get_seq_length(getattr(module, "layer_idx", 0) or 0)))

    def needs(tensor: Tensor, names: Sequence[str]) -> bool:
        parts = (getattr(module, name, None) for name in names)
        return tensor.requires_grad or any(
            p.requires_grad
            for part in parts
            if isinstance(part, nn.Module)
            for p in part.parameters()
        )

    return _scores(
        x.numel() // x.shape[-1],
        keys,
        heads * dim,
        heads * (_first(module, ("v_head_dim",)) or dim),
        needs(x, _QUERY),
        needs(source, _KEY),
        needs(source, _VALUE),
    )


_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_FREE: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)

register(nn.Linear, _linear)
register("transformers.pytorch_utils.Conv1D", _transposed_linear)
register(nn.MultiheadAttention, _torch_attention)
for _type in _CONVOLUTIONS:
    register(_type, _convolution)
for _type in _FREE:
    register(_type, costs_nothing)


def formula_of(module: nn.Module) -> Formula | None:
    """The formula of the module's type or of its nearest registered base, else None."""
    for cls in type(module).__mro__:
        found = _FORMULAS.get(cls) or _FORMULAS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    return _attention if _head_shape(module) is not None else None
