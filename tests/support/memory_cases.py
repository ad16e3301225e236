"""Inputs for the tests of the memory: small sizes, float64, awkward lengths."""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.features import build_features
from atlas_lm.memory.network import Network, Weights, build_network
from atlas_lm.memory.state import Gates, MemoryState, Rule, Tokens, initial_state, map_tokens

B, H, D, E, RANK = 2, 2, 4, 5, 6


class Case(NamedTuple):
    """One sequence per head with everything that a memory takes."""

    network: Network
    features: torch.nn.Module
    q: Tensor
    tokens: Tokens
    initial: Weights

    def inputs(self) -> list[Tensor]:
        """Everything that a gradient must reach."""
        return [self.q, self.tokens.k, self.tokens.v, *self.tokens.gates, *self.initial, *self.features.parameters()]


def make_case(
    kind: str,
    T: int,
    dtype=torch.float64,
    eta_max: float = 1.0,
    restarts: tuple[int, ...] = (),
    sizes: tuple[int, int, int] = (D, E, RANK),
    batch: int = B,
) -> Case:
    """Random unit keys and queries, random gates (retention near 0.95), random W_init; `sizes`: dim, hidden, rank."""
    torch.manual_seed(T)
    (D, E, RANK), B = sizes, batch
    network = build_network(kind, residual=kind == "mlp")
    features = build_features("sketch", D, RANK).to(dtype)

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    q, k = (leaf(nnf.normalize(torch.randn(B, H, T, D), dim=-1)) for _ in range(2))
    v = leaf(torch.randn(B, H, T, D))
    alpha, eta, theta, gamma = (torch.sigmoid(torch.randn(B, H, T) + shift) for shift in (3.0, 0.0, 0.0, 1.0))
    gates = Gates(leaf(alpha), leaf(eta * eta_max), leaf(theta), leaf(gamma))
    initial = tuple(leaf(torch.randn(H, *shape)) for shape in network.shapes(D, features.dim_out, E))
    restart = None
    if restarts:
        restart = torch.zeros(B, H, T, dtype=torch.bool)
        restart[..., [t for t in restarts if t < T]] = True
    return Case(network, features, q, Tokens(k, k.new_empty(0), v, gates, restart), initial)


def run(form: ModuleType, rule: Rule, case: Case, cuts: tuple[int, ...] = ()) -> tuple[Tensor, MemoryState]:
    """Outputs and final state of a whole sequence, given in pieces that end at `cuts`."""
    T = case.q.size(2)
    tokens = case.tokens._replace(phi=case.features(case.tokens.k))
    phi_q = case.features(case.q)
    restart = tokens.restart is not None
    state = initial_state(rule, case.initial, case.q.size(0), phi_q.size(-1), restart)
    outputs = []
    bounds = [0, *cuts, T]
    for i, j in pairwise(bounds):
        piece = map_tokens(lambda x, i=i, j=j: x[:, :, i:j], tokens)
        y, state = form.scan(rule, state, case.initial, case.q[:, :, i:j], phi_q[:, :, i:j], piece)
        outputs.append(y)
    return torch.cat(outputs, dim=2), state


def everything(result: tuple[Tensor, MemoryState]) -> list[Tensor]:
    """Outputs and every float tensor of the final state."""
    y, state = result
    return [y, *state.change, *state.momentum, state.tail.k, state.tail.v, *state.tail.gates]


def relative_errors(truth: list[Tensor], other: list[Tensor]) -> list[float]:
    """‖a − b‖ / ‖a‖ per tensor; where a is zero but for rounding, ‖b‖; infinite for anything not finite.

    Infinite, since a maximum over NaN may be any of the other numbers.
    """
    pairs = [(a.detach(), b.detach()) for a, b in zip(truth, other, strict=True)]
    return [_relative_error(a, b) for a, b in pairs]


def _relative_error(a: Tensor, b: Tensor) -> float:
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    return ((a - b).norm() / a.norm() if a.norm() > 1e-13 else b.norm()).item()


def gradients(result: tuple[Tensor, MemoryState], case: Case) -> list[Tensor]:
    """Gradients of a fixed random projection of outputs and state with respect to every input and parameter."""
    generator = torch.Generator().manual_seed(1)
    values = everything(result)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in values]
    total = sum((x * w).sum() for x, w in zip(values, weights, strict=True))
    found = torch.autograd.grad(total, case.inputs(), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(case.inputs(), found, strict=True)]
