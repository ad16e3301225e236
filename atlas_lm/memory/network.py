"""The memory networks M(W; x) with their inner gradients in closed form (SPEC M2, M3; ATLAS eq 42, 43).

Fast weights are a tuple of matrices, one a layer: (W_in, W_out), or (W_out,) for the linear memory. The gated network
keeps its W_gate and W_up side by side in W_in: one matrix product instead of two.

The gradient of ℓ = ½‖M(W; k) − v‖² with respect to layer l is, token by token, the outer product of that layer's input
and of the gradient at its output. These factors are all that the chunked form ever needs, and no autograd runs in a
forward pass: a memory learns in eval() and under inference_mode() as it does in training.
"""

# B batch (any leading axes), T tokens, D head dim, F feature dim, E hidden dim, P pre-activations (2E gated, E plain)

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

Weights = tuple[Tensor, ...]

SMALLEST_CURVATURE = 1e-6  # of a token that has no features; its gradient is zero as well
_GELU_SLOPE = 0.7978845608028654  # √(2/π), of the tanh form


class Activation(NamedTuple):
    """What stands between the two layers: hidden = act(pre), and both partial derivatives it needs."""

    width: int  # pre-activations per hidden unit
    forward: Callable[[Tensor], Tensor]  # (…, P) → (…, E)
    slopes: Callable[[Tensor], tuple[Tensor, ...]]  # (…, P) → one (…, E) for each of the `width` branches


def _silu_slope(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def _gated(pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return nnf.silu(gate) * up


def _gated_slopes(pre: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = pre.chunk(2, dim=-1)
    return _silu_slope(gate) * up, nnf.silu(gate)


def _gelu(pre: Tensor) -> Tensor:
    return nnf.gelu(pre, approximate="tanh")


def _gelu_slopes(pre: Tensor) -> tuple[Tensor]:
    tanh = torch.tanh(_GELU_SLOPE * (pre + 0.044715 * pre**3))
    inner = _GELU_SLOPE * (1 + 3 * 0.044715 * pre**2)
    return (0.5 * (1 + tanh) + 0.5 * pre * (1 - tanh**2) * inner,)


_ACTIVATIONS = {
    "gated_mlp": Activation(2, _gated, _gated_slopes),
    "mlp": Activation(1, _gelu, _gelu_slopes),
}


class Network(NamedTuple):
    """A memory network: `kind` is gated_mlp (ATLAS eq 43), mlp (eq 42) or linear; `residual` adds the raw input."""

    kind: str
    residual: bool

    @property
    def activation(self) -> Activation | None:
        return _ACTIVATIONS.get(self.kind)

    def shapes(self, dim: int, features: int, hidden: int) -> list[tuple[int, int]]:
        """The shape of every layer's matrix."""
        if self.activation is None:
            return [(features, dim)]
        return [(features, self.activation.width * hidden), (hidden, dim)]


def build_network(kind: str, residual: bool) -> Network:
    if kind not in (*_ACTIVATIONS, "linear"):
        raise ValueError(f"unknown memory network {kind!r}; choose gated_mlp, mlp or linear")
    return Network(kind, residual)


def split_matrices(network: Network, weights: Weights) -> list[Tensor]:
    """The matrices of the paper: W_gate and W_up apart. Newton–Schulz and norms act on these."""
    if network.activation is None:
        return [weights[0]]
    return [*weights[0].chunk(network.activation.width, dim=-1), weights[1]]


def join_matrices(network: Network, matrices: list[Tensor]) -> Weights:
    """The inverse of `split_matrices`."""
    if network.activation is None:
        return (matrices[0],)
    return torch.cat(matrices[:-1], dim=-1), matrices[-1]


def read(network: Network, product: Callable[[int, Tensor], Tensor], x_BTD: Tensor, phi_BTF: Tensor) -> Tensor:
    """M(W; x), where `product(l, input)` multiplies by layer l: (B, T, D), (B, T, F) → (B, T, D)."""
    y = product(0, phi_BTF)
    if network.activation is not None:
        y = product(1, network.activation.forward(y))
    return x_BTD + y if network.residual else y


class Gradient(NamedTuple):
    """∇ℓ of T tokens in factors: layer l's gradient at token i is inputs[l][i] ⊗ errors[l][i]."""

    inputs: tuple[Tensor, ...]  # (B, T, rows of layer l)
    errors: tuple[Tensor, ...]  # (B, T, columns of layer l)
    sensitivity: Tensor  # (B, T) a bound on the norm of J_i = ∂M/∂(pre-activations), without gradient


class Layer(NamedTuple):
    """One layer of a network as seen by T tokens: how it multiplies, and how errors go back through it."""

    forward: Callable[[Tensor], Tensor]  # (B, T, rows) → (B, T, columns)
    backward: Callable[[Tensor], Tensor]  # (B, T, columns) → (B, T, rows)
    squares: Callable[[Tensor], Tensor]  # (B, T, rows) slopes², → (B, T) bound on ‖diag(slopes) W‖²


def plain_layer(w: Tensor) -> Layer:
    """A layer with the same matrix for all tokens."""
    return Layer(lambda x: x @ w, lambda e: e @ w.mT, lambda squared: norm_bound(squared, w))


def gradient(network: Network, layers: list[Layer], k_BTD: Tensor, phi_BTF: Tensor, v_BTD: Tensor) -> Gradient:
    """∇_W ½‖M(W; k) − v‖² for every token at the same weights, in closed form (SPEC M3)."""
    act = network.activation
    if act is None:
        y = layers[0].forward(phi_BTF)
        error = (k_BTD + y if network.residual else y) - v_BTD
        return Gradient((phi_BTF,), (error,), torch.zeros_like(error[..., 0]))
    pre_BTP = layers[0].forward(phi_BTF)
    hidden_BTE = act.forward(pre_BTP)
    y = layers[1].forward(hidden_BTE)
    error_BTD = (k_BTD + y if network.residual else y) - v_BTD
    back_BTE = layers[1].backward(error_BTD)
    slopes = act.slopes(pre_BTP)
    error_BTP = torch.cat([back_BTE * slope for slope in slopes], dim=-1)
    with torch.no_grad():
        squared = torch.stack([slope.square() for slope in slopes]).sum(0)
        sensitivity_BT = layers[1].squares(squared).sqrt()
    return Gradient((phi_BTF, hidden_BTE), (error_BTP, error_BTD), sensitivity_BT)


def norm_bound(squared_BTE: Tensor, w_BED: Tensor) -> Tensor:
    """The smaller of two bounds on ‖diag(slopes) W‖², slopes² given: squared Frobenius norm, and ‖W‖₂² max slope².

    ‖W‖₂² is bounded by the largest row sum of |WᵀW|: tight while the columns are orthogonal, as they are at first. The
    Frobenius norm alone is √D too large there, and would shrink every write by D.
    """
    rows_BE = w_BED.square().sum(dim=-1)
    frobenius_BT = (squared_BTE @ rows_BE.unsqueeze(-1).to(squared_BTE)).squeeze(-1)
    spectral_B = (w_BED.mT @ w_BED).abs().sum(dim=-1).amax(dim=-1)
    return torch.minimum(frobenius_BT, squared_BTE.amax(dim=-1) * spectral_B.unsqueeze(-1))


@torch.no_grad()
def curvature(of: Gradient, scores_BTT: Tensor) -> Tensor:
    """κ_ij ≥ the norm of the block of tokens i, j in the curvature of Σ ℓ (SPEC M16): (B, T) tokens → (B, T, T).

    |g_i·g_j| + |φ_i·φ_j| (1 + ‖J_i‖‖J_j‖) for two layers; the 1 stands for the product of the two layers' changes.
    `scores_BTT` are the φ_i·φ_j.
    """
    kernel = scores_BTT.abs()
    if len(of.inputs) == 1:
        return kernel
    J = of.sensitivity.to(kernel.dtype)
    hidden = of.inputs[1]
    return (hidden @ hidden.mT).abs() + kernel * (1 + J.unsqueeze(-1) * J.unsqueeze(-2))
