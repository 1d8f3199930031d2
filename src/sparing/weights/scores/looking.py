"""A context in which a model is differentiated in float32 and nothing of it is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError
from sparing.core.random_state import random_state, set_random_state_

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def looking(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    batches: Any = None,
    *,
    double: bool = False,
) -> Iterator[None]:
    """Gradients for ``named`` only, evaluation mode, float32 in place of half precision.

    Parameters in half precision stand in float32 meanwhile (as buffers do), named ones as copies
    that may be written to; with ``double`` all that floats stands in float64. Autocast is off.
    Afterwards weights, buffers, gradients, modes, ``requires_grad``, the global generators, and
    those of a data loader given as ``batches``, are as before, also after an error.

    Evaluation mode, because dropout would make the scores a matter of chance and running
    statistics are what the pretrained model works with.

    Raises RequestError if nothing is named, a named parameter is not one of the model's or has
    no gradient, or two names are of one parameter.
    """
    if not named:
        raise RequestError("there is nothing to score; name at least one parameter")
    own = {id(parameter) for parameter in model.parameters()}
    for name, parameter in named.items():
        if id(parameter) not in own:
            raise RequestError(f'"{name}" is not a parameter of the model that is scored')
        if not parameter.is_floating_point():
            raise RequestError(f'"{name}" is {parameter.dtype}, which has no gradient to score by')
    scored = {id(parameter) for parameter in named.values()}
    if len(scored) < len(named):
        raise RequestError(
            f"two of {', '.join(named)} are one parameter; name each once, so that it has one mask"
        )
    with ExitStack() as stack:
        stack.callback(set_random_state_, random_state())
        for generator in _generators(batches):
            stack.callback(generator.set_state, generator.get_state())
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            data = parameter.data  # another object at each access
            stack.callback(_put_back_, parameter, data, parameter.grad)
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in scored)
            wide = _widened(data, double)
            own_copy = wide is not data or id(parameter) not in scored
            parameter.data = wide if own_copy else data.clone()
        copies: dict[int, Tensor] = {}
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is None:
                    continue
                stack.callback(module._buffers.__setitem__, key, buffer)
                if id(buffer) not in copies:
                    wide = _widened(buffer, double)
                    copies[id(buffer)] = buffer.clone() if wide is buffer else wide
                module._buffers[key] = copies[id(buffer)]
        model.eval()
        for kind in {parameter.device.type for parameter in model.parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.enable_grad())
        yield


def _widened(tensor: Tensor, double: bool) -> Tensor:
    """In the type to differentiate in; itself if it is of that type, or does not float."""
    if double and tensor.is_floating_point():
        return tensor.double()
    return tensor.float() if tensor.dtype in HALF else tensor


def _put_back_(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None
    parameter.data = data
    parameter.grad = grad


def _generators(batches: Any) -> Iterable[torch.Generator]:
    """The generators that iterating a data loader would advance."""
    sampler = getattr(batches, "batch_sampler", None)
    owners = (
        batches,
        getattr(batches, "sampler", None),
        sampler,
        getattr(sampler, "sampler", None),
    )
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    return [g for g in found.values() if isinstance(g, torch.Generator)]
