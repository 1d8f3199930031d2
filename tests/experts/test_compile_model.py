"""Whole Hugging Face decoders in one compiled graph, with expert layers where blocks stood."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.experts.zoo import build, inputs
from torch import Tensor, nn

import sparing
from sparing.experts.layer import expert_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers' and the compiler's
]

METHODS: dict[str, Any] = {
    "top-any": sparing.TopAny(max_experts=4),
    "noisy top-k": sparing.NoisyTopK(experts=4, k=2),
    "hash": sparing.HashExperts(experts=4, k=2),  # by the ids that the model's hook hands on
    "shared": sparing.TopK(experts=4, k=1, shared=1),
}


def padded(model: nn.Module, seed: int) -> dict[str, Tensor]:
    batch = inputs(model, seed=seed)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, : 1 + seed % 3] = 0
    return {**batch, "attention_mask": mask}


def step(model: nn.Module, call: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Loss, gradients, and what the layers counted."""
    model.zero_grad()
    logits = call(**batch).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())
    loss = loss + sparing.router_loss(model)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    records = [layer.record for layer in expert_layers(model)]
    return [loss.detach(), *grads, *(r.load.clone() for r in records), *(r.costs for r in records)]


def trains(model: nn.Module, twin: nn.Module, backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    call = torch.compile(twin, backend=counter, fullgraph=True)
    for seed in range(5):
        batch = padded(model, seed)
        found, expected = step(twin, call, batch), step(model, model, batch)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_model_is_one_graph(name: str, backend: str) -> None:
    model = sparing.moefy_(build("llama"), METHODS[name]).train()
    trains(model, copy.deepcopy(model), backend)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_with_checkpoints_is_one_graph(name: str) -> None:
    model = sparing.moefy_(build("llama", use_cache=False), METHODS[name]).train()
    twin = copy.deepcopy(model)
    newer = getattr(twin, "activation_checkpointing_enable", None)
    (newer or twin.gradient_checkpointing_enable)({"use_reentrant": False})
    from torch._dynamo import config

    with config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        trains(model, twin, "aot_eager")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_expert_layers_break_no_graph(family: str, training: bool) -> None:
    from torch._dynamo import config, explain

    dense = build(family).train(training)
    sparse = sparing.moefy_(build(family), METHODS["top-any"]).train(training)
    breaks = []
    for model in (dense, sparse):
        torch._dynamo.reset()
        with config.patch(capture_dynamic_output_shape_ops=True):
            breaks.append(explain(model)(**padded(model, 1)).graph_break_count)
    assert breaks[1] <= breaks[0]
