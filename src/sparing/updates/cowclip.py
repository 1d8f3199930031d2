"""CowClip as a method: the gradients of embedding rows clipped by how often their ids occur.

Zheng et al., AAAI 2023, arXiv 2204.06240; code github.com/bytedance/LargeBatchCTR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparing.core import ranks
from sparing.core.clock import Clock
from sparing.core.errors import RequestError, RunError
from sparing.core.ledger import Ledger
from sparing.core.method import Context, Method, ParamGroups, Setup, Signal
from sparing.core.sparse_gradients import add_up, coalesced
from sparing.updates import clip, crossover, direct, reduction, tables
from sparing.updates.binding import BINS, Binding
from sparing.updates.lagging import Readers
from sparing.updates.lookups import follow, unfollow
from sparing.updates.occurrences import Occurrences
from sparing.updates.options import CowClipOptions
from sparing.updates.rowwise import RowWise
from sparing.updates.tables import Table


@final
class CowClip(Method):
    """Clips each embedding row's gradient to ``cnt * max(r * norm(w), zeta)``.

    Finds the ``nn.Embedding`` and ``nn.EmbeddingBag`` tables of any model, counts the ids of the
    global batch over micro-batches and ranks, and clips before the optimizer's step and before any
    global clipping. ``CowClip.direct(model, optimizer)`` does it in a plain loop.

    Options: see ``CowClipOptions``. Raises RequestError for options and models that cannot work,
    RunError for a table whose gradient came past its module. Tables may lie on several devices:
    ids are counted where their table is.
    """

    name = "cowclip"
    Options = CowClipOptions
    options: CowClipOptions
    identity: ClassVar[Mapping[str, Any]] = {"ratio": float("inf")}
    """Options that leave training as it is without the method."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tables: list[Table] = []
        self._binding = Binding(self.options.by_frequency)
        # of a step that is under way: rows with a gradient, and whether others have none at all
        self._updated: dict[str, tuple[int, bool]] = {}
        self._handles: list[Any] = []
        self._adding: list[Any] = []  # hooks that add up sparse gradients
        self._readers: list[Readers] = []  # of tables whose rows may lag behind their decay
        self._entered = [0, 0, 0, 0]  # row updates and bytes, spent and dense, not yet accounted

    @classmethod
    def direct(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        others: bool = False,
        **options: Any,
    ) -> CowClip:
        """Clip in a plain loop, from now on, before each ``optimizer.step()``.

        Args:
            model: with the tables, already on its device.
            optimizer: has them among its parameters.
            clip: largest global gradient norm, applied after the rows' clip.
            others: that something else may change gradients between backward and step. Without
                it such a change, as by a global clip before ours, is refused.
            options: of the method.

        Returns the method: ``signals()``, ``state_dict()``, ``account(ledger)``; ``remove()`` ends
        it. A ``GradScaler`` works as ever: ``scaler.step`` unscales before it calls the step.
        Raises RequestError for options that change what the optimizer was built with, and for
        tables with sparse gradients whose optimizer takes none.
        """
        method = cls(**options)
        direct.install(method, model, optimizer, clip=clip, others=others)
        return method

    def remove(self) -> None:
        """End what ``direct`` began; the counts stay."""
        for handle in [*self._handles, *self._adding]:
            handle.remove()
        self._handles, self._adding = [], []
        for readers in self._readers:
            readers.all_()
        for table in self.tables:
            if table.lookups is not None:
                unfollow(table.lookups, table.modules)

    # ---- seams -------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        found = tables.find(model, self.options.tables, linear=self.options.linear)
        if self.options.gradients != "keep":
            for table in found:
                for module in table.modules:
                    module.sparse = self.options.gradients == "sparse"  # type: ignore[assignment]
        if self.options.reduce == "rows" and setup.world_size > 1:
            weights = {id(table.weight) for table in found}
            names = [n for n, p in model.named_parameters() if id(p) in weights]
            # DDP then neither adds up their gradients nor sends rank 0's values around
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(model, names)  # type: ignore[no-untyped-call]
            ranks.broadcast_([table.weight for table in found])
        return model

    def optimizer(self, model: nn.Module, groups: ParamGroups) -> ParamGroups:
        own = self.options.group
        if not own:
            return groups
        found = tables.find(model, self.options.tables, linear=self.options.linear)
        weights = {id(table.weight) for table in found}
        made: ParamGroups = []
        for group in groups:
            parts: tuple[list[Any], list[Any]] = ([], [])
            for entry in group["params"]:
                parameter = entry[1] if isinstance(entry, tuple) else entry
                parts[id(parameter) in weights].append(entry)
            rest, ours = parts
            split = [{**group, "params": rest}] if rest else []
            if ours:
                # as the model has them: a global norm adds up in the groups' order, in float32
                first = not rest or group["params"][0] is ours[0]
                split.insert(0 if first else 1, {**group, **own, "params": ours})
            made += split
        return made

    def bind(self, *, model: nn.Module | None = None, **known: Any) -> None:
        if model is None:
            raise RequestError("CowClip.bind needs model=, whose tables it counts the lookups of")
        self.tables = tables.find(model, self.options.tables, linear=self.options.linear)
        form = "rows" if self.options.mode == "lazy" else self.options.mode
        for table in self.tables:
            if table.weight.is_meta:
                raise RequestError(
                    f"table {table.name} is on the meta device and has no values yet; move it to "
                    "its own (model.to_empty(device=...), then load or initialise) before binding"
                )
            table.lookups = follow(table.weight, table.modules, form)
        for handle in self._adding:
            handle.remove()
        self._adding = add_up(model)

    @torch.no_grad()
    def grads(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], context: Context | None
    ) -> None:
        if not self.tables:
            raise RequestError("CowClip knows no model: call bind(model=...) before training")
        self._binding.begin()
        self._updated = {}
        for table in self.tables:  # as many collectives on each rank, in the same order
            self._clip(table)

    def step(self, clock: Clock, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            return
        if self.options.table_lr is not None:  # a trainer's schedule moves the rates of all groups
            for group in optimizer.param_groups:
                if "fixed_lr" in group:
                    group["lr"] = group["fixed_lr"]
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.follow(optimizer)
        for table in self.tables:
            if table.name not in self._updated or id(table.weight) not in groups:
                continue
            group = groups[id(table.weight)]
            (updated, sparse), (rows, width) = self._updated[table.name], table.weight.shape
            by_row = sparse or group.get("rule", "").startswith("rowwise")
            if group.get("rule") and group.get("weight_decay") and not group.get("lazy"):
                by_row = False  # the decay passes over the table
            spent, size = updated if by_row else rows, width * table.weight.element_size()
            amounts = (spent, rows, spent * size, rows * size)
            self._entered = [a + b for a, b in zip(self._entered, amounts, strict=True)]
        self._updated = {}

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Have rows brought up to date before they are read, if they may lag in this optimizer."""
        if isinstance(optimizer, RowWise):
            tables = nn.ModuleList(module for table in self.tables for module in table.modules)
            self._readers = optimizer.follow_(tables)

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        for readers in self._readers:
            readers.all_()
        yield

    # ---- one table ---------------------------------------------------------------------------

    def _clip(self, table: Table) -> None:
        assert table.lookups is not None
        weight, options = table.weight, self.options
        found = table.lookups.take()
        if options.reduce == "rows":
            found = reduction.gather_gradients_(weight, found)
        else:
            found = reduction.gather(found)
        self._catch_up(table, found)
        grad = weight.grad
        if grad is None:
            return
        self._check_ran(table, found)
        threshold = options.threshold(weight.shape[1])
        seen: tuple[Tensor | None, Tensor, Tensor]
        if grad.is_sparse:
            if options.l2:
                raise RequestError(
                    f"table {table.name} has sparse gradients, which have no place for the "
                    "gradient of l2 in rows that do not occur; use dense gradients, or "
                    'table_rule="rowwise-adamw" with table_decay'
                )
            grad = weight.grad = coalesced(grad)
            seen = clip.clip_sparse_(grad, weight, found, threshold)
            self._updated[table.name] = len(seen[1]), True
        else:
            if options.l2:
                grad.add_(weight, alpha=2 * options.l2)
            seen = clip.clip_(grad, weight, found, threshold, self._form(found))
            self._updated[table.name] = int((seen[1] > 0).sum()), False
        self._binding.note(table.name, weight.shape[0], *seen)

    def _catch_up(self, table: Table, found: Occurrences) -> None:
        """What one rank read, and rounded, is read on all, so that their weights stay alike."""
        if not ranks.distributed():
            return
        for readers in self._readers:
            if readers.weight is table.weight:
                padding = [m.padding_idx for m in table.modules if m.padding_idx is not None]
                ids = found.sorted()[0]
                readers.all_(torch.cat([ids, ids.new_tensor(padding)]))

    def _form(self, found: Occurrences) -> str:
        if self.options.mode != "auto":
            return "dense" if self.options.mode == "dense" else "rows"
        return "rows" if crossover.by_rows(found.occurring(), found.rows) else "dense"

    def _check_ran(self, table: Table, found: Occurrences) -> None:
        """A gradient without a single lookup ever, on any rank, came past the module."""
        lookups = table.lookups
        assert lookups is not None
        if lookups.ran or found.counts.numel():
            lookups.ran = True
            return
        raise RunError(
            f"table {table.name} has a gradient, and its module was never called: something reads "
            "its weight directly (F.embedding(ids, table.weight)), where ids cannot be counted. "
            f'Call the module, or leave it out by tables=[...] (it is "{table.name}")'
        )

    # ---- state, account ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self._binding.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._binding.load_state_dict(state)

    def signals(self) -> dict[str, Signal]:
        return dict(self._binding.signals())

    def account(self, ledger: Ledger) -> None:
        rows, dense_rows, size, dense_size = self._entered
        self._entered = [0, 0, 0, 0]
        if dense_rows:
            ledger.add("row_updates", spent=rows, dense=dense_rows)
            ledger.add("bytes", spent=size, dense=dense_size)

    def touches(self) -> list[str]:
        options = self.options
        which = ", ".join(options.tables) + (", linear terms too" if options.linear else "")
        if options.threshold(1).never_binds:
            return [f"tables ({which}): counts ids, clips nothing"]
        limit = f"cnt * max({options.ratio:g} * norm(w), zeta)"
        if options.form == "fixed":
            limit = "cnt * zeta"
        if options.per == "table":
            limit = limit.removeprefix("cnt * ")
        zeta = f"{options.bound:g}" + (" * r^2 * sqrt(d)" if options.published else "")
        return [f"tables ({which}): gradients by {options.per} to {limit}, zeta = {zeta}"]

    def page(
        self, model: nn.Module, passages: list[dict[str, Any]], read: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """``rows_clipped``: the share clipped, and rows and their mean norms, by frequency."""
        found = tables.find(model, self.options.tables, linear=self.options.linear)
        present, over = self._binding.by_frequency.tolist()
        return {
            "rows_clipped": {
                "frequencies": [1 << place for place in range(BINS)],
                "present": present,
                "clipped": over,
                "share": self._binding.signals()["clipped_so_far"],
                "tables": {
                    table.name: self._binding.of_table(table.name, table.weight.cpu())
                    for table in found
                },
            }
        }
