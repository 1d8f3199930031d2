"""Optimizers with one second moment for each row of a table, beside AdamW for the rest.

Row-wise Adagrad and Adam as in FBGEMM (github.com/pytorch/FBGEMM): the square of a row's gradient
is the mean over its columns. Only rows with a gradient are touched, moments of others stand still;
a decay that is decoupled reaches all rows, at once or when they are next read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from sparing.core.errors import RequestError, unknown
from sparing.core.sparse_gradients import coalesced
from sparing.updates.adamw import adamw_, loss_of, require_options
from sparing.updates.lagging import ROWS_AT_ONCE, Readers, catch_up_
from sparing.updates.options import RULES


@final
class RowWise(torch.optim.Optimizer):
    """Row-wise updates for groups with such a ``rule``, AdamW (rule "adamw") for the others.

    Rules of tables, (rows, d), which take sparse and dense gradients:

    - "rowwise-adagrad": one sum a row, 4 bytes;
    - "rowwise-adam": one second moment a row and a first moment a value, 4 + 4 * d bytes;
    - "rowwise-adamw": the same with decoupled decay.

    "adamw" holds 8 bytes a value, and takes dense gradients only. Moments are in float32, whatever
    the weights are in. A dense gradient's rows are those that are not all zero, which costs a pass
    over it: large tables should have ``sparse=True``.

    Args:
        params: parameters or groups; a group may set ``rule`` and any other option.
        lr: the rate.
        betas: of moments; bias is corrected by the number of steps of the whole table.
        eps: added to the root of the second moment. 1e-7 as in Keras, which the published runs of
            CowClip used; torch's own optimizers have 1e-8, and rows with tiny gradients notice.
        weight_decay: decoupled, times the rate, on all rows in every step. With "rowwise-adam" it
            has to be 0: coupled, it would be divided by a moment that stands still for rows that
            do not occur, for which nothing can make up later.
        lazy: of row-wise rules with a decay: instead of a pass over the table in every step, rows
            are decayed when they are next read, exactly, for 8 bytes a row; see ``follow_``.

    Raises RequestError for unknown rules, numbers that make no sense, row-wise rules for what is
    no matrix; at the step for sparse gradients under "adamw", and with ``lazy`` for rows that would
    be read as they were, because nobody called ``follow_``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        lazy: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rule": "adamw",
            "lazy": lazy,
        }
        self._readers: dict[int, Readers] = {}
        self._unread: set[int] = set()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; errors as for the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        require_options(group, "lr", "eps", "weight_decay")
        rule = group["rule"]
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        if rule == "rowwise-adam" and group["weight_decay"]:
            raise RequestError(
                f"weight_decay={group['weight_decay']} coupled to the gradient cannot reach rows "
                'that do not occur; use rule="rowwise-adamw", whose decay is decoupled and exact '
                "for all rows, or torch.optim.Adam on dense gradients"
            )
        if not isinstance(group["lazy"], bool):
            raise RequestError(f"lazy must be true or false, got {group['lazy']!r}")
        for p in group["params"]:
            if rule != "adamw" and p.ndim != 2:
                raise RequestError(
                    f"{rule} updates rows of tables, (rows, d); got a parameter of shape "
                    f'{tuple(p.shape)}: put it into a group with rule="adamw"'
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            if group["rule"] == "adamw":
                self._adamw(group)
            else:
                for p in group["params"]:
                    if p.grad is not None:
                        self._rows(group, p)
        return loss

    def follow_(self, model: nn.Module) -> list[Readers]:
        """Bring rows of the model's tables up to date before they are read, saved or replaced.

        For groups with ``lazy`` and a decay; ``sparing.CowClip`` calls it. Returns their readers.
        What reads a weight past its module sees rows that lag: call ``catch_up_`` before.
        """
        lagging = {
            id(p): p
            for group in self.param_groups
            if group["lazy"] and group["rule"] != "adamw"
            for p in group["params"]
        }
        modules: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and id(module.weight) in lagging:
                modules.setdefault(id(module.weight), []).append(module)
        for key, reading in modules.items():
            if key not in self._readers:
                self._readers[key] = Readers(lagging[key], self)
                self._readers[key].follow(reading)
        return [self._readers[key] for key in modules]

    @torch.no_grad()
    def catch_up_(self, weight: Tensor, ids: Tensor | None = None) -> None:
        """Bring rows that lag up to date, (n,) ids or all; nothing where none lags."""
        state = self.state.get(weight)
        if not state or "stand" not in state:
            return
        total = float(state["decayed"])
        if ids is not None:
            catch_up_(weight, state["stand"], total, ids)
            return
        every = torch.arange(len(weight), device=weight.device)
        for some in torch.split(every, ROWS_AT_ONCE):
            catch_up_(weight, state["stand"], total, some)

    def mark_(self, weight: Tensor) -> None:
        """Take all rows for up to date as they are: they were replaced."""
        state = self.state.get(weight)
        if state and "stand" in state:
            state["stand"].fill_(float(state["decayed"]))

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; rows that lag are brought up to date, as in the model's state."""
        for p in list(self.state):
            self.catch_up_(p)
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_readers": {}, "_unread": set()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer, but moments stay in float32 beside weights of half precision."""
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, place in zip(order, places, strict=True):
            for name, value in state_dict["state"].get(place, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(p.device).clone()

    def _rows(self, group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        if p.grad.is_sparse:
            grad = coalesced(p.grad)
            ids, rows = grad._indices()[0], grad._values()
        else:
            ids = p.grad.any(dim=1).nonzero()[:, 0]
            rows = p.grad.index_select(0, ids)
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        rows, state, rate = rows.to(wide), self.state[p], group["lr"]
        adam = group["rule"] != "rowwise-adagrad"
        if not state:
            state["step"] = torch.zeros(())
            state["second"] = p.new_zeros(p.shape[0], dtype=wide)
            if adam:
                state["first"] = torch.zeros_like(p, dtype=wide)
        state["step"] += 1
        if group["weight_decay"]:
            self._decay(group, p, ids)
        second = state["second"].index_select(0, ids)
        square = rows.square().mean(dim=1)
        if adam:
            (one, two), steps = group["betas"], float(state["step"])
            second = second.lerp(square, 1 - two)
            first = state["first"].index_select(0, ids).lerp(rows, 1 - one)
            state["first"].index_copy_(0, ids, first)
            scale = (second / (1 - two**steps)).sqrt().add_(group["eps"])
            update = first.div_(scale[:, None]).mul_(rate / (1 - one**steps))
        else:
            second += square
            update = rows.div(second.sqrt().add_(group["eps"])[:, None]).mul_(rate)
        state["second"].index_copy_(0, ids, second)
        p.index_copy_(0, ids, (p.index_select(0, ids).to(wide) - update).to(p.dtype))

    def _decay(self, group: dict[str, Any], p: Tensor, ids: Tensor) -> None:
        """All rows, or those of ids, (n,), while the others' debt grows."""
        kept, state = 1 - group["lr"] * group["weight_decay"], self.state[p]
        lazy = group["lazy"]
        if (not lazy or kept <= 0) and "stand" in state:
            self.catch_up_(p)  # no longer lazy, or a product that has no logarithm
        if not lazy or kept <= 0:
            p.mul_(kept)
            return
        if "stand" not in state:
            state["decayed"] = torch.zeros((), dtype=torch.float64)
            state["stand"] = p.new_zeros(p.shape[0], dtype=torch.float64)
        if id(p) not in self._readers:  # a first step leaves time to ask for it
            if id(p) in self._unread:
                raise RequestError(
                    "rows that lag would be read as they were: with lazy=True call "
                    "optimizer.follow_(model) once, after the model is on its device"
                )
            self._unread.add(id(p))
        state["decayed"] += math.log(kept)
        catch_up_(p, state["stand"], float(state["decayed"]), ids)

    def _adamw(self, group: dict[str, Any]) -> None:
        if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
            raise RequestError(
                'rule "adamw" takes no sparse gradients; put tables into a group with '
                'rule="rowwise-adagrad" or "rowwise-adam" (CowClip(table_rule=...) does)'
            )
        adamw_(group, self.state)
