"""Muon for single and stacked matrices, with AdamW for the rest, in one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the
nearest (semi-)orthogonal matrix, found by Newton-Schulz iterations. ``torch.optim.Muon`` takes
two-dimensional parameters only; experts are stacked as (E, m, n), each of which is a matrix of
its own here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from sparing.core.checks import require_number, require_whole
from sparing.core.errors import RequestError
from sparing.updates.adamw import adamw_, loss_of, require_options

# quintic coefficients of the original post: fast growth of small singular values, to about 1
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each of matrices: (..., m, n), roughly.

    Singular values end between about 0.7 and 1.2; a zero matrix stays zero.
    """
    shape = matrices.shape
    x = matrices.reshape(-1, *shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = x.norm(dim=(-2, -1), keepdim=True)
    moving = norm.flatten() > 0
    if x.device.type == "cpu" and not moving.all():
        # experts without a gradient yet, or without one for long, cost nothing
        whole = torch.zeros_like(matrices).view(-1, *shape[-2:])
        whole[moving] = orthogonalize(matrices.reshape(-1, *shape[-2:])[moving], iterations)
        return whole.view(shape)
    # one copy here rather than one in every product
    x = (x / norm.clamp_min(1e-12)).contiguous()
    for _ in range(iterations):
        gram = x @ x.mT
        # the additions ride along with the products
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).reshape(shape)


@final
class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for groups with ``rule="adamw"``.

    Args:
        params: parameters or groups; a group may set ``rule`` and any other option. Parameters of
            rule "muon" must have at least two dimensions, the last two of them the matrix.
        lr: of rule "muon", scaled by sqrt(max(1, rows / columns)); of "adamw", the plain rate.
        momentum: Nesterov momentum of rule "muon".
        weight_decay: decoupled, times the learning rate.
        betas, eps: of rule "adamw".
        iterations: of Newton-Schulz.

    Raises RequestError for a vector under rule "muon" and for unknown rules.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        iterations: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "iterations": iterations,
            "rule": "muon",
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; errors as for the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        require_options(group, "lr", "weight_decay")
        require_number("momentum", group["momentum"], 0, 1)
        require_whole("iterations", group["iterations"], 1)
        if group["rule"] not in ("muon", "adamw"):
            raise RequestError(f'rule must be "muon" or "adamw", got "{group["rule"]}"')
        if group["rule"] == "muon":
            names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                if p.ndim < 2:
                    raise RequestError(
                        f"Muon updates matrices; parameter {name} has shape {tuple(p.shape)}: "
                        'put it into a group with rule="adamw"'
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            if group["rule"] == "muon":
                self._muon(group)
            else:
                adamw_(group, self.state)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        # parameters of one shape are orthogonalised in one batch: small products are slow alone
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            held = state["momentum"]
            held.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(held, group["momentum"])
            alike.setdefault((p.shape[-2], p.shape[-1]), []).append((p, update))
        for (rows, columns), entries in alike.items():
            flat = [update.reshape(-1, rows, columns) for _, update in entries]
            moved = orthogonalize(torch.cat(flat), group["iterations"])
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            parts = torch.split(moved, [part.shape[0] for part in flat])
            for (p, _), part in zip(entries, parts, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(part.view_as(p), alpha=-rate)
