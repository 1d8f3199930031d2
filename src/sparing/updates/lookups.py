"""Counting what a table's gradient comes from, by hooks on the modules that read it.

A lookup counts when the gradient of its output arrives: a forward pass without a backward pass
(evaluation, a probe, generation) leaves no trace, and activation checkpointing, which repeats the
forward pass, has one gradient as ever. The ids of micro-batches are kept, and counted together
when they are asked for: one sort for all of a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from sparing.core import ranks
from sparing.core.errors import RequestError
from sparing.updates.occurrences import Occurrences, count, held, joined_all, nothing

AT_ONCE = 1 << 24
"""Ids that are kept before they are counted, 64 MiB: a step may have many micro-batches."""


@final
class Lookups:
    """What was looked up of one weight since it was last asked; a forward hook of its modules."""

    def __init__(self, weight: nn.Parameter, form: str) -> None:
        self.weight, self.form = weight, form
        self.ran = False
        self.version: int | None = None
        """Of the gradient when it was last added to; None where nobody watches it."""
        self._ids: list[Tensor] = []  # of lookups that are still to be counted
        self._parts: list[Occurrences] = []
        self._whole = False  # the gradients of all parts have been added up

    def __call__(self, module: nn.Module, given: Any, named: Any, output: Tensor) -> None:
        _note(self, module, given, named, output)

    def take(self) -> Occurrences:
        """All since the last call."""
        self._count()
        parts, self._parts = self._parts, []
        if not parts:
            return nothing(self.weight.shape[0], self.weight.device)
        return joined_all(parts)

    def landed(self, weight: Tensor) -> None:
        """A hook for after gradients were added up, where none tells when they are cleared."""
        grad = weight.grad
        self.version = None if grad is None or grad.is_sparse else grad._version
        self._whole = True

    def arrived(self, ids: Tensor, gradient: Tensor) -> None:
        """The gradient of a lookup of ids is here."""
        if self._whole:
            self._whole = False
            if self.weight.grad is None or self._changed():
                # cleared since: an optimizer step was skipped, and these counts with it
                self._ids, self._parts = [], []
        self._ids.append(held(ids.to(self.weight.device), self.weight.shape[0]))
        if sum(part.numel() for part in self._ids) > AT_ONCE:
            self._count()

    def _count(self) -> None:
        if self._ids:
            ids = self._ids[0] if len(self._ids) == 1 else torch.cat(self._ids)
            self._ids = []
            self._parts.append(count(ids, self.weight.shape[0], self.form))

    def _changed(self) -> bool:
        grad = self.weight.grad
        if self.version is None or grad is None or ranks.distributed():
            return False
        return grad._version != self.version


# a graph break: what counts in a backward pass cannot be part of a traced graph
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _note(lookups: Lookups, module: nn.Module, given: Any, named: Any, output: Tensor) -> None:
    lookups.ran = True
    if output.requires_grad and lookups.weight.requires_grad:
        output.register_hook(  # type: ignore[no-untyped-call]
            partial(_arrived, lookups, ids_of(module, given, named))
        )


def _arrived(lookups: Lookups, ids: Tensor, gradient: Tensor) -> None:
    lookups.arrived(ids, gradient)


def ids_of(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The ids of a call that get a gradient, (n,): each lookup, without padding.

    Of a bag every lookup counts, whatever the mode.
    """
    ids: Tensor = given[0] if given else named["input"]
    flat = ids.detach().reshape(-1)
    if isinstance(module, nn.EmbeddingBag) and ids.ndim == 1 and module.include_last_offset:
        offsets = given[1] if len(given) > 1 else named["offsets"]
        flat = flat[: int(offsets[-1])]  # what lies behind the last offset is in no bag
    padding = module.padding_idx
    if padding is not None:
        flat = flat[flat != padding]
    return flat


def follow(weight: nn.Parameter, modules: list[nn.Module], form: str) -> Lookups:
    """The hook on all modules that read the weight; the one that is there, if there is one."""
    for module in modules:
        for hook in module._forward_hooks.values():
            if isinstance(hook, Lookups) and hook.weight is weight:
                return hook
    lookups = Lookups(weight, form)
    for module in modules:
        module.register_forward_hook(lookups, with_kwargs=True)
    return lookups


def unfollow(lookups: Lookups, modules: list[nn.Module]) -> None:
    """Take the hook away again."""
    for module in modules:
        for key, hook in list(module._forward_hooks.items()):
            if hook is lookups:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def check(name: str, module: nn.Module) -> None:
    """Raise RequestError for tables whose gradients are not sums over their lookups."""
    if getattr(module, "scale_grad_by_freq", False):
        raise RequestError(
            f"table {name} has scale_grad_by_freq=True, which divides gradients by the counts that "
            "the clip multiplies its threshold by; build it without"
        )
