"""Runs a network as a positive linear flow: what SynFlow needs of real architectures.

Within ``Linearised`` each operation that is not linear in what flows acts as multiplication by a
constant, the one at which it works just now:

- activations and softmax act by their secant, y = x * (f(x) / x) with the quotient held constant;
  so queries and keys take part: a weight of attention flows in proportion to its score;
- LayerNorm, RMSNorm, GroupNorm and ``normalize`` divide by the root mean square (or length), held
  constant, and subtract no mean, which would cancel a positive flow; BatchNorm divides by its
  running deviation and subtracts no mean; a reciprocal root is held constant wherever it stands;
- sigmoids are gates: held constant;
- rotary positions turn nothing (cos is 1, sin is 0);
- an embedding gives ones, unless its table is differentiated: no token counts more than another.

``torch.nn.MultiheadAttention`` is one operation for this: its softmax stays as it is, so there
queries and keys have no flow where all tokens are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]


@contextmanager
def linearised(model: nn.Module) -> Iterator[None]:
    """Run ``model`` so within this context. No weight is changed: that is for the caller."""
    with ExitStack() as stack:
        for module in model.modules():
            # written out in elementary operations there, which one by one are not linear
            if type(module).__module__ == "transformers.activations":
                stack.callback(module.register_forward_hook(_act).remove)
        stack.enter_context(Linearised())
        yield


@final
class Linearised(TorchFunctionMode):
    """Replaces what the module's docstring names, as functions, methods and in modules."""

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _by(x: Tensor, y: Tensor) -> Tensor:
    """x * (y / x), the quotient held constant; 0 where x is 0 or infinite."""
    usable = x.detach().isfinite() & (x.detach() != 0)
    quotient = torch.where(usable, y.detach() / x.detach(), 0.0)
    return torch.where(usable, x, 0.0) * quotient


def _act(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return _by(args[0], module.forward(args[0].detach()))


def _secant(function: Function) -> Function:
    def replaced(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("inplace", None)
        return _by(input, function(input.detach(), *args, **kwargs))

    return replaced


def _constant(function: Function) -> Function:
    def replaced(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = function(input.detach(), *args, **kwargs)
        return value

    return replaced


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    weights = scores.detach().softmax(-1).nan_to_num(0.0)
    return _by(scores, weights) @ value


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: list[int], eps: float) -> (
    Tensor
):  # fmt: skip
    square = x.detach().square().mean(axes, keepdim=True)
    y = x * (square + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
) -> Tensor:
    return _scaled(input, weight, bias, list(range(-len(normalized_shape), 0)), eps or 0.0)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _layer_norm(input, normalized_shape, weight, None, eps)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    y = _scaled(grouped, None, None, [-1], eps).reshape(input.shape)
    return _by_channel(y, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_var is None:
        y = _scaled(input, None, None, [0, *range(2, input.ndim)], eps)
    else:
        y = _by_channel(input, (running_var + eps).rsqrt(), None)
    return _by_channel(y, weight, bias)


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    view = (-1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.reshape(view)
    return x if bias is None else x + bias.reshape(view)


def _normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True)
    return input / length.clamp_min(eps)


def _embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if weight.requires_grad:
        found: Tensor = F.embedding(input, weight, *args, **kwargs)
        return found
    return weight.new_ones((*input.shape, weight.shape[1]))


_REPLACED: dict[Function, Function] = {
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.normalize: _normalize,
    F.embedding: _embedding,
    torch.cos: torch.ones_like,
    Tensor.cos: torch.ones_like,
    torch.sin: torch.zeros_like,
    Tensor.sin: torch.zeros_like,
}
for _function in (
    F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish,
    F.hardswish, F.softplus, F.tanh, torch.tanh, Tensor.tanh, F.softmax, torch.softmax,
    Tensor.softmax,
):  # fmt: skip
    _REPLACED[_function] = _secant(_function)
for _function in (
    F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.hardsigmoid, torch.rsqrt, Tensor.rsqrt,
):  # fmt: skip
    _REPLACED[_function] = _constant(_function)
