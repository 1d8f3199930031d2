from __future__ import annotations

import torch

from sparing.experts.gates import credit_closed_gates, open_gates

MARGIN = torch.tensor([[0.3, -0.2, 0.0], [-0.1, 0.4, 0.2]])
LIVE = torch.tensor([[True, True, True], [True, True, False]])
UPSTREAM = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def gradient(heard: torch.Tensor) -> torch.Tensor:
    margin = MARGIN.clone().requires_grad_()
    gates = open_gates(margin, (margin > 0) & LIVE, heard)
    assert gates.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert gates.dtype == margin.dtype
    (gates * UPSTREAM).sum().backward()
    assert margin.grad is not None
    return margin.grad


def test_open_gates_alone_hear_the_gradient_unchanged():
    assert gradient((MARGIN > 0) & LIVE).tolist() == [[1, 0, 0], [0, 5, 0]]


def test_all_live_gates_hear_and_others_never_do():
    assert gradient(LIVE).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_the_step_is_the_released_sign_of_relu():
    # sign(relu(m)), with sign passing its gradient on: relu lets it through where m > 0 alone
    margin = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, released = margin.clone().requires_grad_(), margin.clone().requires_grad_()
    upstream = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    opened = ours.detach() > 0
    (open_gates(ours, opened, opened) * upstream).sum().backward()
    above = torch.relu(released)
    step = above + (torch.sign(above) - above).detach()
    assert step.detach().equal(opened.double())
    (step * upstream).sum().backward()
    assert ours.grad is not None
    assert ours.grad.equal(released.grad)


def test_credit_is_the_product_of_the_gradient_and_the_mean_that_stands_in():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    weights.requires_grad_()
    means = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    upstream = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    out = credit_closed_gates(y, weights, means)
    assert out.equal(y)
    (out * upstream).sum().backward()
    assert y.grad is not None
    assert y.grad.equal(upstream)
    credit = (upstream @ means.t()) * (weights == 0)
    torch.testing.assert_close(weights.grad, credit)
    assert weights.grad is not None
    assert not weights.grad[0].any()


def test_credit_of_half_precision_outputs_comes_in_the_weights_type():
    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weights = torch.zeros(5, 2, requires_grad=True)
    out = credit_closed_gates(y, weights, torch.ones(2, 3))
    out.sum().backward()
    assert out.dtype == y.dtype
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32
    assert (weights.grad == 3).all()


def test_output_and_gradient_are_not_copied():
    y = torch.randn(4, 3, requires_grad=True)
    out = credit_closed_gates(y, torch.zeros(4, 2, requires_grad=True), torch.zeros(2, 3))
    assert out.data_ptr() == y.data_ptr()
