"""How features interact: factorisation machine, compressed interaction network, cross layers.

V: (B, F, d) are the vectors of F fields, x0: (B, n) all of them and the numeric features in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn


def pairs(vectors: Tensor) -> Tensor:
    """The sum over pairs of fields of their vectors' products, (B, F, d) -> (B,).

    Rendle 2010 (Factorization Machines), lemma 3.1: half of what the square of the sum has more
    than the sum of squares, which takes F steps instead of F^2.
    """
    return 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)


@final
class Deep(nn.Module):
    """Linear layers, each with ReLU and dropout: (B, inputs) -> (B, widths[-1])."""

    def __init__(self, inputs: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.width = inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, widths[-1])."""
        found: Tensor = self.layers(x)
        return found


@final
class CIN(nn.Module):
    """Compressed interaction network, V -> (B, sum of ``widths``).

    Lian et al. 2018 (xDeepFM), eq. 6 and 7: X^k_h = sum_ij W^{k,h}_ij (X^{k-1}_i * X^0_j), with
    X^0 = V, each summed over the d coordinates. Without an activation, which is what the paper
    finds best (its section 4.4).
    """

    def __init__(self, fields: int, widths: Sequence[int]) -> None:
        super().__init__()
        before = (fields, *widths[:-1])
        self.mixes = nn.ModuleList(
            nn.Linear(fields * last, width, bias=False)
            for last, width in zip(before, widths, strict=True)
        )
        self.width = sum(widths)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, F, d) -> (B, sum of widths)."""
        first = vectors.transpose(1, 2)  # (B, d, F)
        last, pooled = first, []
        for mix in self.mixes:
            products = last.unsqueeze(3) * first.unsqueeze(2)  # (B, d, H, F)
            last = mix(products.flatten(2))  # (B, d, H')
            pooled.append(last.sum(1))
        return torch.cat(pooled, 1)


@final
class Cross(nn.Module):
    """Cross layers with vectors of weights, (B, n) -> (B, n).

    Wang et al. 2017 (Deep & Cross Network), eq. 3: x_{l+1} = x_0 (x_l . w_l) + b_l + x_l.
    """

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(size, 1, bias=False) for _ in range(layers))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        """(B, n) -> (B, n)."""
        x = x0
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x0 * weight(x) + bias + x
        return x


@final
class MatrixCross(nn.Module):
    """Cross layers with matrices, (B, n) -> (B, n).

    Wang et al. 2021 (DCN V2), eq. 1: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l.
    """

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        """(B, n) -> (B, n)."""
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


@final
class MixedCross(nn.Module):
    """Cross layers as gated mixtures of matrices of low rank, (B, n) -> (B, n).

    Wang et al. 2021 (DCN V2), eq. 3 and 4, with tanh and softmax gates of each layer's own:
    x_{l+1} = sum_i G_i(x_l) (x_0 * (U_i g(C_i g(V_i' x_l)) + b)) + x_l. Gates sum to 1, so that
    all experts' U_i are one product over their weighted states and b is added once.
    """

    def __init__(self, size: int, layers: int, rank: int, experts: int) -> None:
        super().__init__()
        self.rank, self.experts = rank, experts
        wide = rank * experts
        self.gates = nn.ModuleList(nn.Linear(size, experts, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(size, wide, bias=False) for _ in range(layers))
        self.inner = nn.ModuleList(
            nn.ModuleList(nn.Linear(rank, rank, bias=False) for _ in range(experts))
            for _ in range(layers)
        )
        self.up = nn.ModuleList(nn.Linear(wide, size) for _ in range(layers))

    def forward(self, x0: Tensor) -> Tensor:
        """(B, n) -> (B, n)."""
        x = x0
        for gate, down, inner, up in zip(self.gates, self.down, self.inner, self.up, strict=True):
            shares = gate(x).softmax(1)  # (B, E)
            low = torch.tanh(down(x)).view(x.shape[0], self.experts, self.rank)
            assert isinstance(inner, nn.ModuleList)
            states = torch.stack([one(low[:, i]) for i, one in enumerate(inner)], 1)
            weighted = shares.unsqueeze(2) * torch.tanh(states)  # (B, E, r)
            x = x0 * up(weighted.flatten(1)) + x
        return x
