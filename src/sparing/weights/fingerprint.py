"""What tells one base from another, so that an adapter is not put on the wrong one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from sparing.core.errors import RequestError

SAMPLED = 4096
"""Values of each parameter that are looked at, evenly spread."""


@torch.no_grad()
def fingerprint(parameters: Iterable[tuple[str, nn.Parameter]], without: Iterable[str]) -> str:
    """A hash of names, shapes and a sample of values, which is quick for large models too.

    Values count as bfloat16, so that the same base in float32 and bfloat16 is the same base.
    ``without``: modules that the adapter brings itself, such as a new head of random values.
    """
    digest = hashlib.sha256()
    left_out = tuple(f"{name}." for name in without)
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        if left_out and name.startswith(left_out):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        sample = flat[::step][:SAMPLED].to(torch.bfloat16).cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_plain(model: nn.Module) -> None:
    """Raise RequestError for a base without parameters, or one whose weights are quantised."""
    if next(model.parameters(), None) is None:
        raise RequestError("there is nothing to adapt: the model has no parameters")
    how = getattr(getattr(model, "config", None), "quantization_config", None)
    if type(how).__name__ == "GgufConfig":
        how = None  # transformers turns what a GGUF file holds into plain weights as it reads it
    bad = next(
        (
            (name, str(p.dtype))
            for name, p in model.named_parameters()
            if not (p.is_floating_point() or p.is_complex())
            or p.is_quantized
            or p.element_size() == 1
        ),
        None,
    )
    packed = next(
        (
            (name, type(module).__name__)
            for name, module in model.named_modules()
            if hasattr(module, "_packed_params") or "quantized" in type(module).__module__
        ),
        None,
    )
    if how is not None or bad is not None or packed is not None:
        where = bad or packed or ("the configuration", type(how).__name__)
        raise RequestError(
            f'the base is quantised ("{where[0]}" is {where[1]}): its weights can be neither '
            f"scored nor merged into; load it in float32, bfloat16 or float16"
        )
