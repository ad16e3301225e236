"""Feature maps φ that raise the capacity of a memory (M1; ATLAS §3.1).

A memory that is linear in φ can hold about dim(φ) pairs, so degree 2 lifts it from O(d) to O(d²). Every map here is
scaled so that φ of a unit vector has unit norm: write strengths then mean the same for every map.
"""

# B batch (any leading axes), D head dim, F feature dim, R rank

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.kernels import features as cpu_features

CONSTANT_WEIGHT = 1 / 32  # share of ‖φ‖² in the constant: a bias for the memory, small, since it is common to all keys
LINEAR_WEIGHT = 1 / 4  # share in the linear part of all monomials of degree 2 (crosstalk E[(q·k)²] = 1/D)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ along the last axis, in the precision of x, to which CUDA's autocast would not keep.

    A zero stays zero, and its gradient finite, in float16 too, where 1e-12 is 0.
    """
    return nnf.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny)).to(x.dtype)


def monomial_weights(degree: int) -> tuple[float, ...]:
    """Share of ‖φ‖² in the monomials of degree 0, 1, …: κ(x, y) = Σ_p weight_p (x·y)^p for unit vectors."""
    if degree == 1:
        return CONSTANT_WEIGHT, 1 - CONSTANT_WEIGHT
    if degree == 2:
        return CONSTANT_WEIGHT, LINEAR_WEIGHT, 1 - CONSTANT_WEIGHT - LINEAR_WEIGHT
    raise ValueError(f"polynomial degree must be 1 or 2, got {degree}; use features=sketch for a cheaper degree 2")


class Monomials(nn.Module):
    """All monomials up to `degree` (1 or 2): C(D+degree, degree) features. ATLAS §3.1.

    (B, D) → (B, F). Inner products are the polynomial kernel Σ_p w_p (x·y)^p.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, dim: int, degree: int) -> None:
        super().__init__()
        self.weights: tuple[float, ...] = monomial_weights(degree)
        self.degree = degree
        self.dim = dim
        rows, columns = torch.triu_indices(dim, dim)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.dim_out = 1 + dim + (len(rows) if degree == 2 else 0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The buffers again, after `to_empty`."""
        for buffer, indices in zip((self.rows, self.columns), torch.triu_indices(self.dim, self.dim), strict=True):
            buffer.copy_(indices)

    def forward(self, x_BD: Tensor) -> Tensor:
        constant = torch.full_like(x_BD[..., :1], self.weights[0] ** 0.5)
        parts = [constant, x_BD * self.weights[1] ** 0.5]
        if self.degree == 2:
            # x_i x_j stands twice in (x·y)², hence the √2 off the diagonal
            scale = torch.where(self.rows == self.columns, 1.0, 2.0).to(x_BD).mul(self.weights[2]).sqrt()
            parts.append(x_BD[..., self.rows] * x_BD[..., self.columns] * scale)
        return torch.cat(parts, dim=-1)


class Sketch(nn.Module):
    """1, x and a learned low-rank sketch (A x) ⊙ (B x) of the degree-2 monomials: 1 + D + R features. M1.

    (B, D) → (B, 1+D+R). The sketch is brought to unit norm, so the map of a unit vector has unit norm for every A, B.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(
                f"the rank of a feature sketch must be at least 1, got {rank}; use features=linear instead"
            )
        self.left_RD = nn.Parameter(torch.empty(rank, dim))
        self.right_RD = nn.Parameter(torch.empty(rank, dim))
        self.reset_parameters()
        self.dim_out = F = 1 + dim + rank
        # by their number: of all shares these have the least crosstalk between random keys, E[κ²] = 1/F
        self.weights = 1 / F, dim / F, rank / F

    def reset_parameters(self) -> None:
        nn.init.normal_(self.left_RD)
        nn.init.normal_(self.right_RD)

    def forward(self, x_BD: Tensor) -> Tensor:
        # as one matrix: of more axes PyTorch picks its product by whether gradients are asked for
        rows = nnf.linear(x_BD.flatten(0, -2), torch.cat([self.left_RD, self.right_RD]))
        both_BR = rows.unflatten(0, x_BD.shape[:-1])
        constant, linear, quadratic = (weight**0.5 for weight in self.weights)
        if cpu_features.can_run(x_BD, both_BR):
            return cpu_features.sketch(x_BD, both_BR, (constant, linear, quadratic))
        left_BR, right_BR = both_BR.chunk(2, dim=-1)
        sketch_BR = unit((left_BR * right_BR).to(x_BD.dtype))
        return torch.cat([torch.full_like(x_BD[..., :1], constant), x_BD * linear, sketch_BR * quadratic], dim=-1)


Features = Monomials | Sketch


def build_features(kind: str, dim: int, rank: int) -> Features:
    """`kind` is linear (degree 1), quadratic (all of degree 2) or sketch (degree 2 with `rank` features)."""
    if kind == "linear":
        return Monomials(dim, 1)
    if kind == "quadratic":
        return Monomials(dim, 2)
    if kind == "sketch":
        return Sketch(dim, rank)
    raise ValueError(f"unknown features {kind!r}; choose linear, quadratic or sketch")
