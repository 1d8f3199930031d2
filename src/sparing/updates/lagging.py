"""Rows that lag behind a decoupled decay, and are brought up to date when they are next read.

A decoupled decay multiplies a row by 1 - rate * decay in each step, whatever else happens to it. A
row that no batch reads needs none of these products: the sum of their logarithms up to any step is
one number for the table, and a row that stands where the sum was c owes exp(sum - c). This is
exact, whatever the rates were. A decay that is coupled to the gradient has no such form under Adam.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 1 << 18
"""Of a pass over a table, so that what it computes on the way needs little memory."""


class CatchesUp(Protocol):
    """An optimizer whose rows may lag."""

    def catch_up_(self, weight: Tensor, ids: Tensor | None = None) -> None:
        """Bring rows up to date, all of them without ids."""

    def mark_(self, weight: Tensor) -> None:
        """Take all rows for up to date as they are."""


@torch.no_grad()
def catch_up_(weight: Tensor, stand: Tensor, total: float, ids: Tensor) -> None:
    """Multiply rows by what they owe, in place; each is rounded once, however far it lags.

    weight: (rows, d); stand: (rows,) float64, the sum at which each row is up to date; total: the
    sum now; ids: (n,), which may repeat.
    """
    own = stand.index_select(0, ids)
    late = own != total
    if not bool(late.any()):
        return
    rows, own = ids[late], own[late]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # not weight itself: a bag with weights of its own keeps it for its backward pass, which needs
    # rows that had been read, and were up to date then
    values = weight.data
    owed = (total - own).exp_().to(wide)
    values.index_copy_(0, rows, (values.index_select(0, rows) * owed[:, None]).to(values.dtype))
    stand.index_fill_(0, rows, total)


@final
class Readers:
    """Hooks of the modules that read one weight: rows are up to date when they are read or saved.

    Evaluation, too, reads through them. A copy of a model has the hooks and no optimizer of its
    own: bring all rows up to date before (``optimizer.catch_up_(weight)``).
    """

    def __init__(self, weight: nn.Parameter, optimizer: CatchesUp) -> None:
        self.weight = weight
        # the optimizer may go; and a deep copy of the model must not copy it
        self.optimizer = weakref.ref(optimizer)
        self._handles: list[Any] = []

    def follow(self, modules: Iterable[nn.Module]) -> None:
        """Install the hooks."""
        for module in modules:
            self._handles += [
                module.register_forward_pre_hook(self._read, with_kwargs=True),
                module.register_state_dict_pre_hook(self._saved),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_post_hook(self._loaded),  # type: ignore[no-untyped-call]
            ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def all_(self, ids: Tensor | None = None) -> None:
        """Bring rows up to date."""
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer.catch_up_(self.weight, ids)

    def _read(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_exporting():
            return
        _catch_up(self, given[0] if given else named["input"])

    def _saved(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.all_()

    def _loaded(self, module: nn.Module, incompatible: Any) -> None:
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer.mark_(self.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> Readers:
        return Readers(memo.get(id(self.weight), self.weight), _Nobody())

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["weight"], _Nobody())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _catch_up(readers: Readers, ids: Tensor) -> None:
    readers.all_(ids.detach().reshape(-1).to(readers.weight.device))


@final
class _Nobody:
    """The optimizer of a copied model; a weak reference to it is dead at once."""

    def catch_up_(self, weight: Tensor, ids: Tensor | None = None) -> None:
        pass

    def mark_(self, weight: Tensor) -> None:
        pass
