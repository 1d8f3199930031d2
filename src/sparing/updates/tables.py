"""Which parameters of a model are embedding tables."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import cast, final

from torch import Tensor, nn

from sparing.core.errors import RequestError, nearest
from sparing.updates import lookups
from sparing.updates.lookups import Lookups


@final
class Table:
    """One weight, the modules that read it, and what was looked up of it."""

    def __init__(self, name: str, weight: nn.Parameter, modules: list[nn.Module]) -> None:
        self.name, self.weight, self.modules = name, weight, modules
        self.lookups: Lookups | None = None

    def __repr__(self) -> str:
        return f"{self.name}: {self.weight.shape[0]:,} x {self.weight.shape[1]}"


def find(
    model: nn.Module, patterns: Sequence[str] = ("*",), *, linear: bool = False
) -> list[Table]:
    """The tables of a model, in its order: ``nn.Embedding`` and ``nn.EmbeddingBag``.

    ``patterns`` are of module names, as in file names; tables of one column, which hold linear
    terms, only if ``linear``. Raises RequestError if a pattern fits no table, if there is none,
    and for a table that something else reads too.
    """
    names = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RequestError(
                f'no table of this {type(model).__name__} is named like "{pattern}"; '
                f"{nearest(pattern, names)}"
            )
    found: dict[int, Table] = {}
    for name, module in names.items():
        weight = cast(nn.Parameter, module.weight)
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if not weight.requires_grad or (weight.shape[1] == 1 and not linear):
            continue
        lookups.check(name, module)
        if id(weight) in found:
            found[id(weight)].modules.append(module)
        else:
            found[id(weight)] = Table(name, weight, [module])
    if not found:
        raise RequestError(
            f"this {type(model).__name__} has no trained nn.Embedding or nn.EmbeddingBag"
            + ("" if linear else " of more than one column (linear=True takes those of one)")
        )
    _check_readers(model, found)
    return list(found.values())


def _check_readers(model: nn.Module, found: dict[int, Table]) -> None:
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            table = found.get(id(parameter))
            if table is not None and not any(module is m for m in table.modules):
                raise RequestError(
                    f"the weight of table {table.name} is that of {name} too, whose gradients come "
                    "from no lookups; leave it out by tables=[...], or untie the two"
                )
    for table in found.values():
        if type(table.weight.data) is not Tensor:
            raise RequestError(
                f"table {table.name} is a {type(table.weight.data).__name__}: its rows are spread "
                "over ranks; keep tables out of FSDP (ignored_modules) and let DDP have them"
            )
