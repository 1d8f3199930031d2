"""Analytic counts of the FLOPs of a training step, forward and backward, per module.

``sparing.core.formulas`` says what counts. The tests compare with ``torch.utils.flop_counter``;
training does not rely on that, since it reads 0 for attention on CPU and for grouped products,
and works on every operation of every step, where this works once per shape of batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sparing.core.errors import RequestError
from sparing.core.formulas import (
    Call,
    Formula,
    Product,
    costs_nothing,
    formula_of,
    matmul_flops,
    register,
)
from sparing.core.recompute import recomputing

__all__ = ["Call", "Formula", "Product", "Static", "count", "matmul_flops", "register"]


@final
@dataclass(frozen=True, slots=True)
class Static:
    """FLOPs of one call of ``run``; ``by_module`` maps a module's name to (forward, backward).

    ``uncounted`` names modules that ran, hold weight matrices, and have no formula.
    """

    forward: int
    backward: int
    by_module: dict[str, tuple[int, int]] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """FLOPs of forward and backward."""
        return self.forward + self.backward


def count(model: nn.Module, run: Callable[[], Any], *, dense: bool = False) -> Static:
    """Run ``run()`` once, which must call ``model``, and count what a training step on it costs.

    Leaves no trace: the model runs in evaluation mode (no dropout, no running statistics, no
    records of routing) and its mode comes back, generators are restored, ``backward`` is not
    called. Gradients are enabled around ``run``, whatever surrounds this call, because which of
    them are needed is read from the graph; what ``run`` itself puts under ``no_grad`` has no
    backward. The same works on the meta device, without computing anything.

    If ``run`` returns a loss (a tensor, ``.loss``, or the first of a tuple), backward is counted
    only for what the loss depends on; otherwise for all that was called. What activation
    checkpointing computes again is not counted. Modules with a true ``owns_flops`` are left out
    with all their children: their cost depends on the data, they account for it themselves.

    ``dense`` counts what training the whole model would cost: as if each parameter were trained,
    and without modules that have a true ``beside_dense``, which methods put into it. Then nothing
    is kept for a backward pass, which ``run`` must not ask for: the memory for training the whole
    model may not be there.

    Raises RequestError if ``run`` calls no module that could be counted.
    """
    table: dict[str, list[tuple[Product, Tensor | None]]] = {}
    uncounted: list[str] = []
    handles = []
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with_formula = 0
        for name, module in _parts(model, "", set()):
            formula = formula_of(module)
            if formula is costs_nothing or (dense and getattr(module, "beside_dense", False)):
                continue
            if formula is not None:
                with_formula += 1
                hook = _counting(name, formula, table)
            elif any(p.ndim > 1 and p.shape[0] > 1 for p in module.parameters(recurse=False)):
                hook = _noting(name, uncounted)
            else:
                continue
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        model.eval()
        # the fused encoder layer of torch, taken in evaluation only, calls none of its parts
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=gpus))
            stack.enter_context(torch.enable_grad())
            if dense:
                for parameter in frozen:
                    parameter.requires_grad_(True)
                stack.enter_context(saved_tensors_hooks(_keep_nothing, _keep_nothing))
            result = run()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
    if with_formula and not table:
        raise RequestError(
            "nothing was counted: run() called none of the model's modules; "
            "let it call the model that count() was given"
        )
    reached = _reached(result)
    by_module = {}
    for name, products in table.items():
        forward = sum(product.flops for product, _ in products)
        backward = sum(
            product.flops * product.grads
            for product, output in products
            if output is not None and (reached is None or output.grad_fn in reached)
        )
        by_module[name] = (forward, backward)
    return Static(
        forward=sum(forward for forward, _ in by_module.values()),
        backward=sum(backward for _, backward in by_module.values()),
        by_module=by_module,
        uncounted=tuple(uncounted),
    )


def _keep_nothing(saved: Any) -> Any:
    """What the graph keeps of a tensor: its backward is never called, only its nodes are read."""
    return None


def _parts(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen or getattr(module, "owns_flops", False):
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from _parts(child, f"{name}.{child_name}" if name else child_name, seen)


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def _counting(
    name: str, formula: Formula, table: dict[str, list[tuple[Product, Tensor | None]]]
) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if recomputing():
            return
        products = formula(Call(module, args, kwargs, output))
        entry = table.setdefault(name, [])
        graph = next((t for t in _tensors(output) if t.grad_fn is not None), None)
        entry.extend((product, graph) for product in products)

    return hook


def _noting(name: str, uncounted: list[str]) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name not in uncounted:
            uncounted.append(name)

    return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _roots(result: Any) -> list[Tensor]:
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(loss, Tensor):
        return [loss]
    if isinstance(result, tuple | list) and result:
        return _roots(result[0])
    return list(_tensors(result))


def _reached(result: Any) -> set[Any] | None:
    """The nodes of the graph that the loss depends on; None if ``run`` returned none."""
    waiting = [t.grad_fn for t in _roots(result) if t.grad_fn is not None]
    if not waiting:
        return None
    reached: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        waiting.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
    return reached
