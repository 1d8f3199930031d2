"""Prefix tuning: trained keys and values beside those of an attention layer.

Li and Liang 2021 (arXiv 2101.00190), as flat vectors for each layer, without the network that
produced them in training there. Published, the prefix shares the softmax with the tokens
(``shared_softmax``), which takes weight from them from the first step on. By default it has a
softmax of its own whose result is added, and values of zero: nothing changes at the start. That
is the additive view of He et al. 2022 (arXiv 2110.04366, section 3.1), close to the zero-start
attention of Zhang et al. 2023 (arXiv 2303.16199).

The prefix enters where transformers' attention layers call their attention function, after
rotary positions and the cache of keys: positions, caches and generation stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.core.flops import Call, Product, matmul_flops, register
from sparing.weights.adapter import Adapter, place_of
from sparing.weights.factor import Factor

NAMED = "sparing_prefix_"
"""Begins the names of the attention functions that look for a prefix first."""
SUPPORTED = ("sdpa", "eager")


@final
class Prefix(Adapter):
    """P trained keys and values: key and value are (P, kv_heads * head_dim)."""

    kind: ClassVar[str] = "prefix"
    factors: ClassVar[tuple[str, ...]] = ("key", "value")
    units: ClassVar[tuple[tuple[tuple[str, int], ...], ...]] = ((("key", 0), ("value", 0)),)

    def __init__(
        self, key: Tensor, value: Tensor, *, head_dim: int, shared_softmax: bool = False
    ) -> None:
        super().__init__()
        self.key, self.value = Factor(key), Factor(value)
        self.head_dim, self.shared_softmax = int(head_dim), bool(shared_softmax)

    @staticmethod
    def fresh(
        module: nn.Module,
        *,
        length: int,
        zero_start: bool,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Prefix:
        """Keys of unit norm in expectation, values zero; else both so, in the shared softmax."""
        kv_dim, head_dim = sizes(module)
        key = torch.empty(length, kv_dim).normal_(std=head_dim**-0.5, generator=generator)
        value = torch.zeros(length, kv_dim)
        if not zero_start:
            value.normal_(std=head_dim**-0.5, generator=generator)
        device = next(module.parameters()).device
        key, value = (factor.to(device=device, dtype=dtype) for factor in (key, value))
        return Prefix(key, value, head_dim=head_dim, shared_softmax=not zero_start)

    def config(self) -> dict[str, Any]:
        return {"head_dim": self.head_dim, "shared_softmax": self.shared_softmax}

    def attached_(self, module: nn.Module) -> None:
        look_for_prefixes_(module)

    def removed_(self, module: nn.Module) -> None:
        look_no_more_(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # a model from a pickle names the function, which its new process has to know
        for original in SUPPORTED:
            _register(original)

    def pairs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as attention takes them: (1, kv_heads, P, head_dim), typed ``like``."""
        shaped = [
            factor.matrix().to(like.dtype).view(1, factor.shape[0], -1, self.head_dim)
            for factor in (self.key, self.value)
        ]
        return shaped[0].transpose(1, 2), shaped[1].transpose(1, 2)

    def forward(self, query: Tensor, scaling: float | None) -> Tensor:
        """What the prefix alone gives: query (B, H, S, head_dim) to (B, S, H, head_dim)."""
        key, value = (
            pair.repeat_interleave(query.shape[1] // pair.shape[1], 1) for pair in self.pairs(query)
        )
        key, value = (pair.expand(query.shape[0], -1, -1, -1) for pair in (key, value))
        if not key.shape[2]:
            return torch.zeros_like(query).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2)

    def joined(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask with the prefix in front, which every query may look at."""
        first = [pair.expand(key.shape[0], -1, -1, -1) for pair in self.pairs(key)]
        length, known = first[0].shape[2], key.shape[2]
        if mask is None:
            causal = getattr(module, "is_causal", True) if causal is None else causal
            if causal and query.shape[2] > 1:
                square = torch.ones(query.shape[2], known, dtype=torch.bool, device=key.device)
                mask = square.tril()[None, None]
        if mask is not None:
            mask = mask[..., :known]
            seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
            mask = torch.cat([seen.expand(*mask.shape[:-1], length), mask], -1)
        return torch.cat([first[0], key], 2), torch.cat([first[1], value], 2), mask


def sizes(module: nn.Module) -> tuple[int, int]:
    """(kv_heads * head_dim, head_dim) of an attention layer of transformers."""
    head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    for name in ("k_proj", "key", "k_lin"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear) and head_dim:
            return projection.out_features, int(head_dim)
    heads = getattr(module, "num_heads", None)
    if heads and head_dim and hasattr(module, "c_attn"):
        return int(heads) * int(head_dim), int(head_dim)
    raise RequestError(
        f"cannot tell the heads of a {type(module).__name__}; prefixes go into attention layers of "
        f"transformers that have a k_proj, key or c_attn"
    )


def look_for_prefixes_(module: nn.Module) -> None:
    """Let the attention layers that share the module's configuration look for a prefix."""
    config: Any = module.config
    name = config._attn_implementation
    if name.startswith(NAMED):
        return
    if name not in SUPPORTED:
        raise RequestError(
            f"prefixes work with the attention implementations {', '.join(SUPPORTED)}; this model "
            f'uses "{name}": load it with attn_implementation="sdpa"'
        )
    _register(name)
    config._attn_implementation = NAMED + name


def look_no_more_(module: nn.Module) -> None:
    """Undo ``look_for_prefixes_``, for all layers that share the configuration.

    A prefix that stays elsewhere in the model has to look again: see ``delete_``.
    """
    config: Any = module.config
    config._attn_implementation = config._attn_implementation.removeprefix(NAMED)


def _register(original: str) -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAMED + original, partial(_attend, original))
    known = AttentionMaskInterface()
    if original in known:
        AttentionMaskInterface.register(NAMED + original, known[original])


def _function(module: nn.Module, original: str) -> Callable[..., Any]:
    """The attention function that the layer would have called."""
    if original == "eager":  # each model file has its own
        found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if found is None:
            raise RequestError(f"{type(module).__name__} has no eager attention to put a prefix in")
        return found  # type: ignore[no-any-return]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[original]  # type: ignore[no-any-return]


def _attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the layer's prefixes; query (B, H, S, d) to (B, S, H, d)."""
    place = place_of(module)
    acting = [part for part in place.acting() if isinstance(part, Prefix)] if place else []
    alone = query, named.get("scaling")
    for prefix in acting:
        if prefix.shared_softmax:
            key, value, attention_mask = prefix.joined(
                module, query, key, value, attention_mask, named.get("is_causal")
            )
    if any(prefix.shared_softmax for prefix in acting) and attention_mask is None:
        named = {**named, "is_causal": False}
    output, weights = _function(module, original)(
        module, query, key, value, attention_mask, **named
    )
    for prefix in acting:
        if not prefix.shared_softmax:
            output = output + prefix(*alone)
    return output, weights


def _formula(call: Call) -> list[Product]:
    """Queries times keys and probabilities times values, each (B H S) x head_dim x P."""
    module, query = call.module, call.x
    flops = matmul_flops(query.numel() // module.head_dim, module.head_dim, module.key.shape[0])
    key, value = module.key.values.requires_grad, module.value.values.requires_grad
    return [
        Product(flops, query.requires_grad + key),
        Product(flops, (query.requires_grad or key) + value),
    ]


register(Prefix, _formula)
