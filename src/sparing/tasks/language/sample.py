"""Sampling text from a byte-level model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparing.core.modes import evaluating


def sample(
    model: nn.Module, prompts: Tensor, count: int, *, seed: int, temperature: float = 0.8
) -> Tensor:
    """Continue ``prompts`` (B, P) int64 by ``count`` bytes each: (B, count) int64 on the CPU.

    Draws from its own generator, seeded with ``seed``, and decodes with the model's key-value
    cache, one byte a step.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    inputs = prompts.to(device)
    cache = None
    drawn: list[Tensor] = []
    with evaluating(model):
        for _ in range(count):
            outputs = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits = outputs.logits[:, -1].float().cpu() / temperature  # (B, V)
            # A model may have more tokens than there are bytes; only bytes are text.
            chances = logits[:, :256].softmax(dim=-1)
            following = torch.multinomial(chances, 1, generator=generator)  # (B, 1)
            drawn.append(following)
            inputs = following.to(device)
    return torch.cat(drawn, dim=1)
