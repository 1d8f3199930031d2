"""Sparse adapters: which entries of an adapter exist is decided before any of them is trained.

He et al., Findings of EMNLP 2022, arXiv 2210.04284.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, final

import torch.nn.functional as F
from torch import nn

from sparing.core.errors import RequestError
from sparing.core.ledger import Ledger
from sparing.core.method import Method, ParamGroups, Setup, Signal
from sparing.weights.adapter import attach_
from sparing.weights.build import parts as build
from sparing.weights.build import spots
from sparing.weights.factor import Factor
from sparing.weights.files import load_adapter_, save_adapter, stored_bytes
from sparing.weights.frozen import enter, trained_only
from sparing.weights.installed import base_parameters, merged, names, note_of, parts, trained
from sparing.weights.installing import installing
from sparing.weights.options import Options, require_name
from sparing.weights.places import heads
from sparing.weights.scoring import Loss, choose, compact_, require_finite
from sparing.weights.switching import switch_

_CELLS = (8, 48)
"""Rows and columns of the picture of a mask, at most."""


@final
class SparseAdapter(Method):
    """Trains a sparse adapter on a frozen base; see ``Options`` for its keywords.

    Most scores need to see the loss of a few batches before the optimizer exists. ``adapt_`` is
    given them; where a host prepares the model, ``on`` gives them, or else the host's ``Setup``
    does. They are needed at that moment and not in the first training step, because the shapes of
    the parameters, and so of the optimizer's state, depend on the masks.
    """

    name: ClassVar[str] = "sparse-adapter"
    freezes: ClassVar[bool] = True
    Options = Options
    freezes_base: ClassVar[bool] = True
    """The base stays as it was bit for bit, and before training the adapter changes nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._data: Iterable[Any] | None = None
        self._loss: Loss | None = None
        self._sizes: dict[str, int] = {}
        self._kept: dict[str, tuple[int, int]] = {}
        self._written = (0, 0)

    def __getstate__(self) -> dict[str, Any]:
        # data and loss belong to the program, which no file can hold
        return {**self.__dict__, "_data": None, "_loss": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseAdapter:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._data, copied._loss = self._data, self._loss
        return copied

    @classmethod
    def at_random(
        cls, options: Mapping[str, Any], signals: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]] | None:
        """The same adapter with as many entries, kept at random."""
        if options.get("score") == "random" or options.get("keep") == 1:
            return None
        return {cls.name: {**options, "score": "random"}}

    def on(self, data: Iterable[Any], loss: Loss | None = None) -> Self:
        """Score these batches when the model is prepared; ``loss`` as for ``adapt_``."""
        self._data, self._loss = data, loss
        return self

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        if self.options.name not in names(model):
            seed = setup.seed if self.options.seed is None else self.options.seed
            data, loss = self._data, self._loss
            if data is None and setup.batches is not None:
                data, loss = setup.batches(), setup.loss if loss is None else loss
            adapt_(model, self, data=data, loss=loss, seed=seed)
        self._own(model)
        return model

    def bind(self, *, model: nn.Module | None = None, **known: Any) -> None:
        if model is not None:
            self._own(model)

    def _own(self, model: nn.Module) -> None:
        if self.options.name not in names(model):
            return
        mine = parts(model, self.options.name)
        self._kept = {
            f"{path}.{name}": (factor.kept, factor.size)
            for path, part in mine.items()
            for name, factor in part.named_factors()
        }
        base = sum(p.numel() for p in base_parameters(model).values())
        values = sum(p.numel() for part in mine.values() for p in part.parameters())
        own = sum(p.numel() for p in trained(model, self.options.name).values())
        stored, dense = stored_bytes(model, self.options.name)
        self._sizes = {
            "base": base,
            "values": values,
            "trained": own,
            "stored": stored,
            "dense": dense,
        }

    def optimizer(self, model: nn.Module, groups: ParamGroups) -> ParamGroups:
        return trained_only(groups)

    def touches(self) -> list[str]:
        lines = [
            f"{name}: keeps {kept:,} of {size:,} entries"
            for name, (kept, size) in self._kept.items()
        ]
        if self._sizes:
            lines.append(
                f"trains {self._sizes['trained']:,} values beside a frozen base of "
                f"{self._sizes['base']:,}"
            )
        return lines

    def account(self, ledger: Ledger) -> None:
        enter(ledger, self._sizes, self._written)
        self._written = (0, 0)

    def signals(self) -> dict[str, Signal]:
        if not self._sizes:
            return {}
        kept = [kept for kept, _ in self._kept.values()]
        sizes = [size for _, size in self._kept.values()]
        return {
            "trained_parameters": self._sizes["trained"],
            "adapter_parameters": self._sizes["values"],
            "kept_entries": sum(kept),
            "entries": sum(sizes),
            "stored_bytes": self._sizes["stored"],
            "dense_stored_bytes": self._sizes["dense"],
            "kept_share": sum(kept) / max(sum(sizes), 1),
            "kept_shares": [k / max(s, 1) for k, s in zip(kept, sizes, strict=True)],
        }

    def state_dict(self) -> dict[str, Any]:
        # masks and values are the model's, in its own state
        return {"options": self.to_dict()}

    def export(self, model: nn.Module, path: Path) -> None:
        save_adapter(model, path, name=self.options.name)
        whole = sum(p.numel() * p.element_size() for p in base_parameters(model).values())
        self._written = sum(file.stat().st_size for file in path.iterdir()), whole

    @classmethod
    def imported(cls, path: Path, base: Callable[[], nn.Module]) -> nn.Module:
        return load_adapter_(base(), path)

    def page(self, model: nn.Module, passages: list[dict[str, Any]], read: Any) -> dict[str, Any]:
        """``kept``: by matrix its shape, how many entries exist, and where, coarsely."""
        kept = {
            f"{path}.{name}": {
                "shape": list(factor.shape),
                "kept": factor.kept,
                "grid": _grid(factor),
            }
            for path, part in parts(model, self.options.name).items()
            for name, factor in part.named_factors()
        }
        return {"kept": kept}


def adapt_(
    model: nn.Module,
    method: SparseAdapter,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    name: str | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Freeze a model and give it a sparse adapter, in place; it acts and is trained from now on.

    data: batches to score, of which the first ``method.options.batches`` are looked at; needed
    unless the score is one of ``DATA_FREE`` or all is kept. loss: ``loss(model, batch) -> number``,
    a mean over samples; None is the model's own for a mapping with labels, cross-entropy for
    (x, y). name: of the adapter, where a model has several; None is the method's.

    Afterwards the parameters that require a gradient are the adapter's kept values, its biases and
    what ``train_also`` names. Raises RequestError for requests that cannot be met, and then leaves
    the model as it was.
    """
    options = method.options
    name = options.name if name is None else name
    require_name(name)
    if seed is None:
        seed = 0 if options.seed is None else options.seed
    data = method._data if data is None else data
    loss = method._loss if loss is None else loss
    if merged(model):
        raise RequestError("adapters are merged into the base; unmerge_ them first")
    with installing(model, name, method.to_dict(), heads(model, options.train_also)):
        owned = tuple(note_of(model)["adapters"][name]["heads"])
        where = [s for s in spots(model, options) if not _inside(s.path, owned)]
        if not where:
            raise RequestError(
                f"there is nothing to adapt beside {', '.join(owned)}, which is trained as a whole"
            )
        made = build(model, options, where, seed)
        for path, part in made.items():
            attach_(model.get_submodule(path), path, name, part)
        switch_(model, name)
        compact_(made, choose(model, made, options, data, loss, seed), options.pattern)
        require_finite(made)
    return model


def _grid(factor: Factor) -> list[list[float]]:
    """The share of entries that exist, in a grid of at most 8 by 48 cells, lying."""
    mask = factor.mask().float().cpu()
    mask = mask if mask.shape[0] <= mask.shape[1] else mask.t()
    cells = min(mask.shape[0], _CELLS[0]), min(mask.shape[1], _CELLS[1])
    shares = F.adaptive_avg_pool2d(mask[None], cells)[0]
    return [[round(share, 2) for share in row] for row in shares.tolist()]


def _inside(path: str, owned: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in owned)
