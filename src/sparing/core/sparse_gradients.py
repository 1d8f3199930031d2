"""Which optimizers take the gradients of tables with ``sparse=True``."""

from __future__ import annotations

import torch
from torch import nn

from sparing.core.errors import RequestError

DENSE_ONLY = (
    torch.optim.Adam,  # and AdamW, which is one
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.LBFGS,
)
NO_DECAY = (torch.optim.SGD, torch.optim.Adagrad)
WAY_OUT = (
    'use optimizer "rowwise" (sparing.updates.rowwise.RowWise), torch.optim.SparseAdam for the '
    "tables alone, or SGD or Adagrad without weight decay; or build the table with sparse=False"
)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise RequestError if a table with sparse gradients is an optimizer's that takes none."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or not module.sparse:
            continue
        group = groups.get(id(module.weight))
        if group is None:
            continue
        kind = type(optimizer).__name__
        if isinstance(optimizer, DENSE_ONLY):
            raise RequestError(
                f"table {name} has sparse gradients, and {kind} takes none: {WAY_OUT}"
            )
        if isinstance(optimizer, NO_DECAY) and group.get("weight_decay"):
            raise RequestError(
                f"table {name} has sparse gradients, and {kind} takes none with weight_decay="
                f"{group['weight_decay']}: {WAY_OUT}"
            )
