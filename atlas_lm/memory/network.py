"""The memory networks M(W; x) with their inner gradients in closed form (M2, M3; ATLAS eq 42, 43).

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

from atlas_lm.memory.host_reads import may_look

Weights = tuple[Tensor, ...]

SMALLEST_CURVATURE = 1e-6  # of a token that has no features; its gradient is zero as well
_GELU_SLOPE, _GELU_CUBIC = 0.7978845608028654, 0.044715  # √(2/π); of the tanh form


class Activation(NamedTuple):
    """What stands between the two layers: hidden = act(pre). P = width · E pre-activations."""

    width: int  # pre-activations per hidden unit
    forward: Callable[[Tensor], Tensor]  # (…, P) → (…, E)
    learn: Callable[[Tensor], tuple[Tensor, Tensor]]  # (…, P) → hidden (…, E) and its partial derivatives (…, P)
    # (…, P), gradients of hidden (…, E) and, where they were used, of the derivatives (…, P) → gradient of pre (…, P)
    backward: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _gated(pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return nnf.silu(gate) * up


def _silu_slope(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ, SiLU and SiLU′ = σ + SiLU (1 − σ)."""
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return sigmoid, silu, torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1)


def _gated_learn(pre: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = pre.chunk(2, dim=-1)
    _, silu, slope = _silu_slope(gate)
    return silu * up, torch.cat([slope * up, silu], dim=-1)


def _gated_backward(pre: Tensor, dhidden: Tensor, dslopes: Tensor | None) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    sigmoid, silu, slope = _silu_slope(gate)
    if dslopes is None:
        return torch.cat([slope * up * dhidden, silu * dhidden], dim=-1)
    dgate, dup = dslopes.chunk(2, dim=-1)  # of slope · up and of silu
    bend = (1 - sigmoid) * torch.addcmul(2 * sigmoid + silu, silu, sigmoid, value=-2)  # SiLU″
    into_gate = torch.addcmul(slope * torch.addcmul(dup, dhidden, up), bend * up, dgate)
    return torch.cat([into_gate, torch.addcmul(dhidden * silu, dgate, slope)], dim=-1)


def _gelu(pre: Tensor) -> Tensor:
    return nnf.gelu(pre, approximate="tanh")


def _gelu_parts(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh of the argument, the argument's slope, and GELU′."""
    tanh = torch.tanh(_GELU_SLOPE * (pre + _GELU_CUBIC * pre**3))
    inner = _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * pre**2)
    return tanh, inner, 0.5 * (1 + tanh) + 0.5 * pre * (1 - tanh**2) * inner


def _gelu_learn(pre: Tensor) -> tuple[Tensor, Tensor]:
    tanh, _, slope = _gelu_parts(pre)
    return 0.5 * pre * (1 + tanh), slope


def _gelu_backward(pre: Tensor, dhidden: Tensor, dslopes: Tensor | None) -> Tensor:
    tanh, inner, slope = _gelu_parts(pre)
    if dslopes is None:
        return slope * dhidden
    bend = (1 - tanh**2) * (inner + pre * (3 * _GELU_SLOPE * _GELU_CUBIC * pre - tanh * inner**2))  # GELU″
    return torch.addcmul(slope * dhidden, bend, dslopes)


_ACTIVATIONS = {
    "gated_mlp": Activation(2, _gated, _gated_learn, _gated_backward),
    "mlp": Activation(1, _gelu, _gelu_learn, _gelu_backward),
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
    """∇_W ½‖M(W; k) − v‖² for every token at the same weights, in closed form (M3)."""
    act = network.activation
    if act is None:
        y = layers[0].forward(phi_BTF)
        error = (k_BTD + y if network.residual else y) - v_BTD
        return Gradient((phi_BTF,), (error,), torch.zeros_like(error[..., 0]))
    pre_BTP = layers[0].forward(phi_BTF)
    hidden_BTE, slopes_BTP = act.learn(pre_BTP)
    slopes = slopes_BTP.unflatten(-1, (act.width, -1))
    y = layers[1].forward(hidden_BTE)
    error_BTD = (k_BTD + y if network.residual else y) - v_BTD
    back_BTE = layers[1].backward(error_BTD)
    error_BTP = (slopes * back_BTE.unsqueeze(-2)).flatten(-2)
    with torch.no_grad():
        sensitivity_BT = layers[1].squares(slopes.square().sum(-2)).sqrt()
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
    """κ_ij ≥ the norm of the block of tokens i, j in the curvature of Σ ℓ (M16): (B, T) tokens → (B, T, T).

    |g_i·g_j| + |φ_i·φ_j| (1 + ‖J_i‖‖J_j‖) for two layers; the 1 stands for the product of the two layers' changes.
    `scores_BTT` are the φ_i·φ_j.
    """
    kernel = scores_BTT.abs()
    if len(of.inputs) == 1:
        return kernel
    J = of.sensitivity.to(kernel.dtype)
    hidden = of.inputs[1]
    return (hidden @ hidden.mT).abs() + kernel * (1 + J.unsqueeze(-1) * J.unsqueeze(-2))


def sizes(network: Network, change: Weights) -> list[Tensor]:
    """Root mean square of the entries of every matrix of the paper: per layer (B, matrices side by side)."""
    act = network.activation
    shapes = [w.unflatten(-1, (act.width if act and l == 0 else 1, -1)) for l, w in enumerate(change)]
    return [torch.linalg.vector_norm(w, dim=(-3, -1)) / (w.size(-3) * w.size(-1)) ** 0.5 for w in shapes]


def scales(network: Network, change: Weights, radius: float) -> list[Tensor]:
    """By how much every matrix of the paper is multiplied to lie on the ball: per layer (B, matrices), 1 inside."""
    found = []
    for size in sizes(network, change):
        outside = size > radius
        # the division only sees sizes outside: 0 / 0 in the branch not taken would still be a gradient of NaN
        found.append(torch.where(outside, radius / torch.where(outside, size, 1.0), 1.0))
    return found


def scaled(w: Tensor, scale: Tensor) -> Tensor:
    """The matrices that lie side by side in w (B, R, Q), each times its number of (B, matrices)."""
    return (w.unflatten(-1, (scale.size(-1), -1)) * scale.unsqueeze(-1).unsqueeze(-3)).flatten(-2)


def shrink(network: Network, change: Weights, radius: float) -> Weights:
    """Scale every matrix of the paper back onto the ball wherever it lies outside; times 1, exactly, inside."""
    return tuple(scaled(w, scale) for w, scale in zip(change, scales(network, change, radius), strict=True))


def renormalised(network: Network, initial: Weights, change: Weights) -> Weights:
    """W − W_init after every column of W was given the length that it has in W_init (LaCT, arXiv 2505.23884).

    `initial` (H, R, Q) and `change` (B, H, R, Q) per layer. A column turns and does not grow.
    """

    def turned(w0: Tensor, w: Tensor) -> Tensor:
        column = w0 + w
        length = column.square().sum(-2, keepdim=True)
        some = length > 0  # a column of zeros has no direction, and √0 no gradient
        wanted = torch.linalg.vector_norm(w0, dim=-2, keepdim=True)
        return torch.where(some, wanted * torch.where(some, length, 1.0).rsqrt(), 1.0) * column - w0

    return tuple(turned(w0.to(w.dtype), w) for w0, w in zip(initial, change, strict=True))


def shrink_backward(held: Tensor, scale: Tensor, dheld: Tensor) -> Tensor:
    """The gradient of w from that of what it was scaled to: (B, R, Q), and (B, matrices) numbers.

    On the ball only what changes the direction of a matrix has any effect: scale · (dheld − its part along held).
    """
    w, d = (x.unflatten(-1, (scale.size(-1), -1)) for x in (held, dheld))
    per_matrix = (scale < 1).unsqueeze(-1).unsqueeze(-3)
    length = w.square().sum((-3, -1), keepdim=True)
    along = (w * d).sum((-3, -1), keepdim=True) / torch.where(length > 0, length, 1.0)
    return scaled((d - torch.where(per_matrix, along, 0.0) * w).flatten(-2), scale)


def surely_inside(change: Weights, radius: float) -> bool:
    """Whether no matrix needs to shrink: a cheap test, false for some that do not need it either.

    A matrix of the paper is at most as long as what it is stored in. False where a look would wait for a GPU.
    """
    if change[0].is_meta:  # nothing is known, and nothing is computed
        return True
    if not may_look(change[0]):
        return False
    limits = [torch.linalg.vector_norm(w, dim=(-2, -1)) ** 2 * 2 <= radius**2 * w.size(-2) * w.size(-1) for w in change]
    return bool(torch.stack([limit.all() for limit in limits]).all())
