"""Two changed lines in loops as people write them: data of Hugging Face, mixed precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparing

N = 48


@pytest.mark.parametrize("form", [None, "torch"])
def test_data_sets_of_hugging_face(form):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": [float(i) for i in range(N)], "label": [1] * N})
    rows = rows.with_format(form).select(range(1, N))  # an indices mapping on top
    sampler = sparing.InfoBatch(ratio=0.5, size=len(rows), epochs=4)
    loader = DataLoader(sparing.indexed(rows), sampler=sampler, batch_size=10)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:
            assert batch["x"].tolist() == (batch["index"] + 1).tolist()
            sampler.loss((batch["x"].float() + 1).requires_grad_(), batch["index"])
    assert sampler.lengths()[0] == N - 1 > sampler.lengths()[1]


def loop(*, autocast: bool, scale: bool, accumulate: int) -> tuple[torch.Tensor, list[int]]:
    """The weights after four epochs, and what they took."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=random)
    train_set = TensorDataset(x, (x[:, 0] + 0.5 * x[:, 1] > 0).long())
    model = torch.nn.Linear(6, 2)
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 6, generator=random) * 0.1)
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=scale, init_scale=2.0**10)
    sampler = sparing.InfoBatch(ratio=0.5, delta=0.75, size=N, epochs=4, seed=1)
    loader = DataLoader(sparing.indexed(train_set), sampler=sampler, batch_size=8)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for number, (index, inputs, labels) in enumerate(loader, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = F.cross_entropy(model(inputs), labels, reduction="none")
            scaler.scale(sampler.loss(losses, index) / accumulate).backward()
            if number % accumulate == 0 or number == len(loader):
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return model.weight.detach(), sampler.lengths()


def test_mixed_precision_and_accumulation_in_a_plain_loop():
    plain, lengths = loop(autocast=False, scale=False, accumulate=2)
    assert lengths[0] == lengths[3] == N > lengths[1]
    scaled, same = loop(autocast=False, scale=True, accumulate=2)
    assert same == lengths
    torch.testing.assert_close(scaled, plain)
    mixed, others = loop(autocast=True, scale=True, accumulate=2)
    assert others[0] == others[3] == N > others[1]
    assert mixed.isfinite().all()
    assert F.cosine_similarity(mixed.flatten(), plain.flatten(), 0) > 0.99
