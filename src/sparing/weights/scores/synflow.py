"""SynFlow: the share of an entry in the flow from ones at the input to the output, without data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError, RunError
from sparing.weights.masks import Layers, require_finite, shares
from sparing.weights.patterns import Units
from sparing.weights.scores.batches import changed
from sparing.weights.scores.gradients import STEP, Loss, Named, normalised, zero_factors
from sparing.weights.scores.linearised import linearised
from sparing.weights.scores.looking import looking
from sparing.weights.scores.survival import by_survival, mask_


def synflow(
    model: nn.Module,
    named: Named,
    batches: Iterable[Any] = (),
    loss: Loss | None = None,
    *,
    keep: float | None = None,
    steps: int = 100,
    scope: str = "global",
    pattern: str = "entry",
    layer_of: Layers | None = None,
    units: Units | None = None,
    zero: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """|w * dR/dw|, R the sum of the outputs for ones at the input, all weights made positive.

    Tanaka et al. 2020: R is the flow along all paths, so the scores of what a path passes are
    conserved from layer to layer. It runs through the network itself, made linear as
    ``sparing.weights.scores.linearised`` says, with the absolute values of all parameters and
    buffers, in float64.

    batches, loss: only the shapes of the first batch are used: ``loss(model, batch)`` is called
    with ones in place of its floating-point values, so that the model is called in its own way,
    and its result is ignored. Without batches the model's ``dummy_inputs`` serve, which Hugging
    Face models have.
    keep: then the score is taken in ``steps`` of an exponential schedule, each without what
    fell before, as the paper does against the collapse of whole layers; scores rank by
    survival (see ``by_survival``) and scope, pattern, layer_of and units are those of ``masks``.
    Without keep it is taken once. Beside a skip connection a branch may still collapse as a
    whole, since the flow has another way; ``scope="layer"`` or "tensor" prevents it.
    zero: parameters that begin at zero (None: those that are all 0). All their entries stand in
    as equal, and each tensor's scores are divided by their mean.

    Scores are float32 (float64 of float64 parameters); the model is left as it was. Raises
    RequestError if there is nothing to call the model by, or if no named parameter is reached;
    RunError if the flow is not finite.
    """
    dtypes = {name: torch.promote_types(p.dtype, torch.float32) for name, p in named.items()}
    zeros = zero_factors(named, zero)
    with ExitStack() as stack:
        stack.enter_context(looking(model, named, batches, double=True))
        batch = next(iter(batches), None)
        stack.enter_context(linearised(model))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.abs()
            for module in model.modules():
                for key, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        module._buffers[key] = buffer.abs()
            for name in zeros:
                named[name].fill_(STEP)
        whole = {name: parameter.detach().clone() for name, parameter in named.items()}

        def score(within: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
            if within is not None:
                with torch.no_grad():
                    for name, parameter in named.items():
                        parameter.copy_(whole[name])
                mask_(named, within)
            flow = _flow(model, batch, loss)
            found = torch.autograd.grad(flow, list(named.values()), allow_unused=True)
            scores = {
                name: torch.zeros_like(p) if g is None else (p.detach() * g).abs()
                for (name, p), g in zip(named.items(), found, strict=True)
            }
            require_finite(scores)
            return normalised(scores) if zeros else scores

        if keep is None:
            scores = score(None)
        else:
            scores = by_survival(
                score,
                named,
                shares(keep, steps),
                scope=scope,
                pattern=pattern,
                layer_of=layer_of,
                units=units,
            )
    return {name: found.to(dtypes[name]) for name, found in scores.items()}


def _flow(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The sum of what the model gives when it is called on ones."""
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        _call(model, batch, loss)
    finally:
        hook.remove()
    if not outputs:
        raise RequestError(
            "loss(model, batch) did not call the model; SynFlow takes its output from that call"
        )
    found = _output(outputs[0])
    if found is None or not found.requires_grad:
        raise RequestError(
            "the model's output depends on none of the parameters that are to be scored"
        )
    flow = found.sum()
    if not bool(flow.isfinite()):
        raise RunError(
            f"SynFlow's flow through the network is {float(flow.detach())}; it has an operation "
            f"that cannot be made linear, use another score"
        )
    return flow


def _call(model: nn.Module, batch: Any, loss: Loss | None) -> None:
    if batch is None:
        place = next(model.parameters()).device
        model(**changed(_inputs(model), lambda t: _ones(t).to(place)))
        return
    if loss is None:
        raise RequestError("batches without a loss; give loss(model, batch), which calls the model")
    loss(model, changed(batch, _ones))


def _inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs of a shape that a Hugging Face model takes, by name."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values":
        side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if isinstance(side, int):
            return {"pixel_values": torch.ones(1, channels, side, side)}
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, Mapping) or any(part is None for part in inputs.values()):
        raise RequestError(
            "SynFlow needs no data, but the shape of an input, and this model does not tell it by "
            "dummy_inputs; give one batch and loss(model, batch)"
        )
    return dict(inputs)


def _ones(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.ones_like(tensor, dtype=torch.float64)


def _output(output: Any) -> Tensor | None:
    """The first tensor that is not a loss: floating point, with axes."""
    if isinstance(output, Tensor):
        return output if output.ndim > 0 and output.is_floating_point() else None
    if isinstance(output, Mapping):
        parts = [part for name, part in output.items() if name != "loss"]
    else:
        parts = list(output) if isinstance(output, list | tuple) else []
    for part in parts:
        found = _output(part)
        if found is not None:
            return found
    return None
