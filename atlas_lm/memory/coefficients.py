"""How all gates of a chunk fold into coefficients of its gradients and of the weights that it starts from (M7).

    Γ = A · diag(η) · Θ · diag(1 − θ) · Ω,   A[t,s] = Π_{r=s+1..t} α_r,   Θ[s,j] = Π_{r=j+1..s} θ_r

Nothing here depends on the fast weights, so every chunk is done at once.
"""

# B batch, H heads, K chunks, C chunk, N = C + halo tokens of a block, R rows

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.kernels.compiled import once_differentiable
from atlas_lm.memory.state import Rule, Tokens, without_autocast


class Segments(NamedTuple):
    """Where restarts cut a block. Tokens after one have W_init as their W_ξ, and see nothing from before it."""

    same_segment: Tensor  # (B, H, K, N, N) bool: both tokens lie in one segment
    in_start_segment: Tensor  # (B, H, K, N, 1) bool: in the segment that the chunk's W_ξ belongs to
    cut: Tensor  # (B, H, K, C) bool: restarts at this token


def segments(rule: Rule, blocks: Tokens) -> Segments | None:
    if blocks.restart is None:
        return None
    segment = blocks.restart.long().cumsum(-1)
    belongs = segment[..., rule.halo - 1 : rule.halo] if rule.halo else torch.zeros_like(segment[..., :1])
    same_segment = segment.unsqueeze(-1) == segment.unsqueeze(-2)
    return Segments(same_segment, (segment == belongs).unsqueeze(-1), blocks.restart[..., rule.halo :])


class Decays(NamedTuple):
    """The gates of the chunks' own tokens, each (…, C)."""

    eta: Tensor
    intake: Tensor  # 1 − θ
    retain: Tensor  # α, zero at restarts: nothing crosses them
    carry: Tensor  # θ, alike


def decays(rule: Rule, blocks: Tokens, keeps: Segments | None) -> Decays:
    alpha, eta, theta = (gate[..., rule.halo :] for gate in blocks.gates[:3])
    if keeps is None:
        return Decays(eta, 1 - theta, alpha, theta)
    return Decays(eta, 1 - theta, alpha.masked_fill(keeps.cut, 0.0), theta.masked_fill(keeps.cut, 0.0))


def gate_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of gates, whatever a GPU is allowed to round in products of float32: computed in float64, and small."""
    with without_autocast(a):
        return (a.double() @ b.double()).to(a.dtype)


class DecayProducts(torch.autograd.Function):
    """P[t, s] = Π_{r=s+1..t} decay_r, lower triangular: (…, C) → (…, C, C).

    ∂P[t, s]/∂decay_r = P[t, r] P[r−1, s] for s < r ≤ t: products again, so a decay of 0 needs no division by it, as the
    gradient of a cumulative product or of a sum of logarithms does.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor) -> Tensor:
        C = decay.size(-1)
        later = torch.ones(C, C, dtype=torch.bool, device=decay.device).tril(-1)
        products = torch.where(later, decay.unsqueeze(-1), 1.0).cumprod(-2).tril()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    def backward(ctx: Any, dproducts: Tensor) -> Tensor:
        (products,) = ctx.saved_tensors
        through = gate_product(products.mT, dproducts.tril(-1))[..., 1:, :]  # Σ_t P[t, r] dP[t, s]
        return nnf.pad((through * products[..., :-1, :]).sum(-1), (1, 0))


def _scan(x: Tensor, decay: Tensor) -> Tensor:
    """y_j = x_j + decay_{j−1} y_{j−1}, in log₂ C steps: (…, C), (…, C − 1) → (…, C). No gradient."""
    y, step = x.clone(memory_format=torch.contiguous_format), 1
    while step < y.size(-1):
        y[..., step:].add_(decay * y[..., :-step])  # the product is there before anything is written
        decay = decay[..., step:] * decay[..., :-step]
        step *= 2
    return y


class _FromEnd(torch.autograd.Function):
    """r_j = x_j + decay_{j+1} r_{j+1} from the last token back: (…, C) twice → (…, C).

    Autograd through the steps of a scan would be some hundred operations; the way back is one more scan.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        later = decay[..., 1:]
        r = _scan(x.flip(-1), later.flip(-1)).flip(-1)
        ctx.save_for_backward(r, later)
        return r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dr: Tensor) -> Any:
        r, later = ctx.saved_tensors
        dx = _scan(dr, later)
        return dx, nnf.pad(dx[..., :-1] * r[..., 1:], (1, 0))


class _ToEnd(torch.autograd.Function):
    """Π_{r=s+1..C} decay_r for every s: (…, C) → (…, C).

    The gradient of a cumulative product is a cumulative sum, which has no order on a GPU, or a division, which a decay
    of 0 forbids: it is P_r Σ_{s<r} dP_s Π_{s<r'<r} decay_r', a scan.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor) -> Tensor:
        later = decay[..., 1:]
        products = nnf.pad(later.flip(-1).cumprod(-1).flip(-1), (0, 1), value=1.0)
        ctx.save_for_backward(products, later)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dproducts: Tensor) -> Any:
        products, later = ctx.saved_tensors
        return nnf.pad(products[..., 1:] * _scan(dproducts, later)[..., :-1], (1, 0))


def _band(gamma: Tensor, chunk: int, context: int, same_segment: Tensor | None) -> Tensor:
    """Ω[j, i] = γ_i for j−c < i ≤ j: (…, N) → (…, C, N). M4."""
    N = gamma.size(-1)
    ones = torch.ones(N, N, dtype=torch.bool, device=gamma.device)
    band = (ones.tril() & ones.triu(1 - context))[N - chunk :]
    gamma = gamma.unsqueeze(-2)
    omega = torch.where(band, gamma, torch.zeros_like(gamma))
    return omega if same_segment is None else omega * same_segment[..., N - chunk :, :]


class Reads(NamedTuple):
    """Coefficients of a read at every token of a chunk."""

    weights: Tensor  # (…, C) a_t of W_ξ − W_init; zero after a restart
    momentum: Tensor  # (…, C) b_t
    gradients: Tensor  # (…, C, N) Γ


def reads(gates: Decays, gamma: Tensor, context: int, same_segment: Tensor | None) -> Reads:
    """γ (…, N) and `same_segment` (…, N, N) or None: of blocks."""
    eta, intake, retain, carry = gates
    A = DecayProducts.apply(retain)
    folded = gate_product(A * eta.unsqueeze(-2), DecayProducts.apply(carry))  # A diag(η) Θ
    momentum = folded[..., 0] * carry[..., :1]
    weights = A[..., 0] * retain[..., :1]
    gradients = gate_product(folded * intake.unsqueeze(-2), _band(gamma, eta.size(-1), context, same_segment))
    return Reads(weights, momentum, gradients)


class Steps(NamedTuple):
    """Coefficients of W and S at a chunk's end."""

    weights: Tensor  # (B, H, K) a_C of W_ξ − W_init
    momentum: Tensor  # (B, H, K) of S_ξ in W
    carry: Tensor  # (B, H, K) of S_ξ in S
    eta: Tensor  # (B, H, K) mean write strength, for Newton–Schulz
    write_weights: Tensor  # (B, H, K, N) of each gradient in W
    write_momentum: Tensor  # (B, H, K, N) of each gradient in S


def steps(rule: Rule, blocks: Tokens, keeps: Segments | None) -> Steps:
    """The last row of what `reads` returns, without its C×C matrices: a global memory has long chunks."""
    eta, intake, retain, carry = decays(rule, blocks, keeps)
    retain_to_end, carry_to_end = _ToEnd.apply(torch.stack([retain, carry])).unbind()
    last = torch.ones_like(eta) if keeps is None else keeps.same_segment[..., rule.halo :, -1].to(eta)
    if rule.update == "newton_schulz":
        return _one_write(rule, blocks, keeps, last, retain_to_end[..., 0] * retain[..., 0])
    on_intake = _FromEnd.apply(retain_to_end * eta, carry)
    omega = _band_sum(rule, blocks, keeps, torch.stack([on_intake, carry_to_end], -2) * intake.unsqueeze(-2))
    return Steps(
        retain_to_end[..., 0] * retain[..., 0],
        on_intake[..., 0] * carry[..., 0],
        carry_to_end[..., 0] * carry[..., 0],
        (eta * last).sum(-1) / last.sum(-1),
        omega[..., 0, :],
        omega[..., 1, :],
    )


def _one_write(rule: Rule, blocks: Tokens, keeps: Segments | None, last: Tensor, weights: Tensor) -> Steps:
    """Of Newton–Schulz: momentum acts between chunks, with the mean θ, and takes all gradients of a chunk alike.

    Weighted by the momentum of single tokens, the one write would hold the chunk's last two or three alone.
    `last` (B, H, K, C): the tokens after the chunk's last restart.
    """
    eta, theta = (gate[..., rule.halo :] for gate in blocks.gates[1:3])
    count = last.sum(-1)
    mean_eta, mean_theta = ((gate * last).sum(-1) / count for gate in (eta, theta))
    goes_on = torch.ones_like(count) if keeps is None else (~keeps.cut.any(-1)).to(count)
    taken = last * (1 - mean_theta).unsqueeze(-1)
    omega = _band_sum(rule, blocks, keeps, torch.stack([torch.zeros_like(taken), taken], -2))
    return Steps(weights, torch.zeros_like(count), mean_theta * goes_on, mean_eta, omega[..., 0, :], omega[..., 1, :])


def _band_sum(rule: Rule, blocks: Tokens, keeps: Segments | None, x_BHKRC: Tensor) -> Tensor:
    """x Ω, the last rows of it: (B, H, K, R, C) → (B, H, K, R, N)."""
    if rule.context == 1 and keeps is None:
        return x_BHKRC * blocks.gates.gamma.unsqueeze(-2)
    if keeps is not None:
        return gate_product(x_BHKRC, _band(blocks.gates.gamma, rule.chunk, rule.context, keeps.same_segment))
    windows = nnf.pad(x_BHKRC, (rule.halo, rule.halo)).unfold(-1, rule.context, 1).sum(-1)
    return windows * blocks.gates.gamma.unsqueeze(-2)
