"""One chunk of the memory: learn, read, update (SPEC M7). Without autograd; `chunk_gradient.py` is the way back.

w = W_ξ − W_init lies above s = S_ξ in one matrix z per layer, so that few products pass over it. Layer by layer, with
inputs x (x₁ = φ(k), x₂ = h), errors e and the coefficients ω/D and Γ/D of `coefficients.py`:

    learn    p = r + x₁ w₁    h = act(p)    e₂ = h (W + w₂) − v    e₁ = act′(p) ⊙ e₂ (W + w₂)ᵀ
    read     p′ = r′ + [a x′, −b x′] z − (Γ/D ⊙ x′xᵀ) e      with x′ = φ(q), then the hidden activations of the read
    update   z ← [[α, −β], [0, θ]] z + [−ω_w/D x, ω_s/D x]ᵀ e

r and r′ are the products of keys and queries with W_init. Behind a restart in the chunk `old` is 0, and w is not seen.
"""

# G batch × heads, K chunks, C chunk, N = C + halo tokens of a block, F feature dim, P pre-activations, E hidden dim
# of layer l: R rows (F or E), Q columns (P or D)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_lm.memory import network as net
from atlas_lm.memory.network import Network
from atlas_lm.memory.newton_schulz import newton_schulz

Maybe = Any  # a tensor, or None where the rule has no use for it

SMALL = 64  # up to so many tokens a product is bound by the matrix that it adds to, and is done in that one's precision


STATES = 64  # fast weights that are kept for the backward pass, at most; those between are computed again


def check_records(gone: bool) -> None:
    """RuntimeError where a chunk's records were given back by an earlier backward pass."""
    if gone:
        raise RuntimeError("the memory's graph is gone after its first backward pass; call the model again")


class Plan(NamedTuple):
    """What is no tensor."""

    network: Network
    context: int
    update: str
    newton_schulz_steps: int
    radius: float
    # of matrix products and of what they give; states and coefficients are wide, and so is D once it is summed
    operands: torch.dtype
    complete: int  # chunks that end; the last one may be unfinished
    train: bool  # keep what a backward pass needs


class Chunks(NamedTuple):
    """What a scan gives of all chunks; from `decay` on coefficients, the gates of every token where reads see them."""

    phi: Tensor  # (G, K, N, F)
    v: Tensor  # (G, K, N, D)
    phi_q: Tensor  # (G, K, C, F)
    gamma: Tensor  # (G, K, N)
    same: Maybe  # (G, K, N, N) tokens of one segment, no gradient; None without restarts
    old: Maybe  # (G, K, N, 1) tokens of W_ξ's segment, no gradient
    decay: Tensor  # (G, K, 2, 2) [[α, −β], [0, θ]]
    eta: Tensor  # (G, K) of Newton–Schulz
    on: Tensor  # (G, K, 2, N) −ω_w, ω_s
    token_eta: Maybe  # (G, K, C), as the next three: `coefficients.Decays`; None where reads are at the chunk's start
    intake: Maybe
    retain: Maybe
    carry: Maybe


class Inputs(NamedTuple):
    """What does not depend on the fast weights. `scores`, `at` and `over` are for reads inside chunks."""

    phi: Tensor  # these as in `Chunks`
    v: Tensor
    phi_q: Tensor
    gamma: Tensor  # no gradient
    same: Maybe
    old: Maybe
    decay: Tensor
    eta: Tensor
    on: Tensor
    scores: Maybe  # (G, K, C, N) φ(q)·φ(k)
    at: Maybe  # (G, K, 2, C) a, −b
    over: Maybe  # (G, K, C, N) Γ
    initial_out: Maybe  # (G, E, D) W_init of the second layer
    by_initial: Tensor  # (G, K, N, P) φ(k) W_init
    q_by_initial: Tensor  # (G, K, C, P) φ(q) W_init


class Record(NamedTuple):
    """What the backward pass needs of a chunk."""

    inputs: tuple[Tensor, ...]  # x_l
    errors: tuple[Tensor, ...]  # e_l
    pre: Tensor
    slopes: Maybe
    back: Maybe  # e₂ (W + w₂)ᵀ
    total: Maybe  # D (G, C or 1, N)
    over: Maybe  # Γ/D
    read_pre: Tensor
    read_hidden: Maybe
    bounded: bool = False


def add_outer(target: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """target += aᵀ b, in place: (G, R, Q), (G, N, R), (G, N, Q)."""
    if a.size(1) <= SMALL or a.dtype == target.dtype:
        return target.baddbmm_(a.to(target.dtype).mT, b.to(target.dtype))
    return target.add_(torch.bmm(a.mT, b))


def twice(x: Tensor, by: Tensor) -> Tensor:
    """[by₁ x, by₂ x]: (G, N, R), (G, 2, N, 1) → (G, N, 2R)."""
    return torch.cat([x * by[:, 0], x * by[:, 1]], dim=-1)


def masked(x: Tensor, old: Maybe) -> Tensor:
    return x if old is None else x * old


def masks(plan: Plan, x: Inputs, n: int) -> tuple[Maybe, Maybe]:
    """`old` of the block and of the chunk's own tokens, to multiply with."""
    if x.old is None:
        return None, None
    old = x.old[:, n].to(plan.operands)
    return old, old[:, old.size(1) - x.phi_q.size(2) :]


def learn_and_read(plan: Plan, x: Inputs, n: int, states: list[Tensor]) -> tuple[Tensor, Record]:
    """Learn and read a chunk."""
    act, low = plan.network.activation, plan.operands
    old, own = masks(plan, x, n)
    z = [state.to(low) for state in states]
    w = [state[:, : state.size(1) // 2] for state in z]
    w0: Maybe = None if x.initial_out is None else x.initial_out.to(low)
    phi, phi_q = x.phi[:, n], x.phi_q[:, n]
    pre = torch.baddbmm(x.by_initial[:, n], masked(phi, old), w[0])
    inputs: tuple[Tensor, ...] = (phi,)
    errors: tuple[Tensor, ...] = (pre,)
    slopes = back = total = None
    if n < plan.complete or x.at is not None:  # a read at W_ξ needs no gradient of an unfinished chunk
        if act is None:
            errors = (pre - x.v[:, n],)
        else:
            hidden, slopes = act.learn(pre)
            if old is None:
                w_out = w0 + w[1]
                error = torch.baddbmm(x.v[:, n], hidden, w_out, beta=-1)
                back = error @ w_out.mT
            else:
                error = torch.baddbmm(hidden @ w0 - x.v[:, n], hidden * old, w[1])
                back = torch.baddbmm(error @ w0.mT, error * old, w[1].mT)
            inputs = (phi, hidden)
            errors = ((slopes.unflatten(-1, (act.width, -1)) * back.unsqueeze(-2)).flatten(-2), error)
        if plan.update == "gradient":
            total = _shared_curvature(plan, x, n, inputs, slopes, w0, w)
    over = None
    if x.at is None or total is None:
        read_pre = torch.baddbmm(x.q_by_initial[:, n], masked(phi_q, own), w[0])
    else:
        over, at = (x.over[:, n] / total).to(low), x.at[:, n].unsqueeze(-1).to(low)
        read_pre = torch.baddbmm(x.q_by_initial[:, n], twice(phi_q, at), z[0])
        read_pre.baddbmm_(over * x.scores[:, n], errors[0], alpha=-1)
    record = Record(inputs, errors, pre, slopes, back, total, over, read_pre, None)
    if act is None:
        return read_pre, record
    read_hidden = act.forward(read_pre)
    if over is None:
        y = (
            torch.baddbmm(read_hidden @ w0, masked(read_hidden, own), w[1])
            if own is not None
            else (read_hidden @ (w0 + w[1]))
        )
    else:
        y = torch.baddbmm(read_hidden @ w0, twice(read_hidden, at), z[1])
        y.baddbmm_(over * (read_hidden @ hidden.mT), errors[1], alpha=-1)
    return y, record._replace(read_hidden=read_hidden)


def _shared_curvature(
    plan: Plan, x: Inputs, n: int, inputs: tuple[Tensor, ...], slopes: Maybe, w0: Maybe, w: list[Tensor]
) -> Tensor:
    """D[t, i] = c (κ_ii + Σ_{j≤t, j≠i} γ_j κ_ij) for every t of the chunk, its end alone where only that is read.

    (G, C or 1, N). See `reference.py`.
    """
    phi, old = inputs[0], x.old
    sensitivity = phi[..., 0]
    if slopes is not None and w0 is not None and plan.network.activation is not None:
        squared = slopes.square().unflatten(-1, (plan.network.activation.width, -1)).sum(-2)
        bound = net.norm_bound(squared, w0 + w[1])
        if old is not None:
            bound = torch.where(old[:, n].squeeze(-1), bound, net.norm_bound(squared, w0))
        sensitivity = bound.sqrt()
    kappa = net.curvature(net.Gradient(inputs, (), sensitivity), phi @ phi.mT)
    if x.same is not None:
        kappa = kappa * x.same[:, n]
    gamma = x.gamma[:, n].to(kappa.dtype)
    own = kappa.diagonal(dim1=-2, dim2=-1) * (1 - gamma)
    if x.at is None:
        shared = gamma.unsqueeze(-2) @ kappa
    else:
        C, N = x.phi_q.size(2), kappa.size(-1)
        seen = torch.ones(N, N, dtype=kappa.dtype, device=kappa.device).tril()[N - C :]
        shared = seen @ (gamma.unsqueeze(-1) * kappa)
    return (plan.context * (own.unsqueeze(-2) + shared)).clamp_min(net.SMALLEST_CURVATURE).to(x.gamma.dtype)


def on_gradients(x: Inputs, n: int, record: Record) -> Tensor:
    """ω/D (G, 2, N, 1), in the precision of the error."""
    on = x.on[:, n] if record.total is None else x.on[:, n] / record.total[:, -1:]
    return on.unsqueeze(-1).to(record.errors[0].dtype)


def mix(coefficients: Tensor, state: Tensor) -> Tensor:
    """(G, 2, 2) times the halves w and s of a state (G, 2R, Q)."""
    return (coefficients @ state.unflatten(1, (2, -1)).flatten(2)).view(state.shape)


def update(plan: Plan, x: Inputs, n: int, states: list[Tensor], record: Record) -> tuple[list[Tensor], bool]:
    """The states behind a chunk, and whether the ball had to hold them."""
    on = on_gradients(x, n, record)
    after = [
        add_outer(mix(x.decay[:, n], z), twice(inputs, on), error)
        for z, inputs, error in zip(states, record.inputs, record.errors, strict=True)
    ]
    if plan.update == "newton_schulz":
        for z, u in zip(after, orthogonal(plan, [half(z, 1) for z in after]), strict=True):
            half(z, 0).addcmul_(x.eta[:, n, None, None], u, value=-1)
    change = tuple(half(z, 0) for z in after)
    if net.surely_inside(change, plan.radius):
        return after, False
    for w, held in zip(change, net.shrink(plan.network, change, plan.radius), strict=True):
        w.copy_(held)
    return after, True


def half(state: Tensor, which: int) -> Tensor:
    """The view of w (0) or s (1)."""
    return state.unflatten(1, (2, -1))[:, which]


def orthogonal(plan: Plan, momentum: list[Tensor]) -> tuple[Tensor, ...]:
    """U(s) of every matrix."""
    split = net.split_matrices(plan.network, tuple(s.to(plan.operands) for s in momentum))
    written = [newton_schulz(s, plan.newton_schulz_steps).to(momentum[0].dtype) for s in split]
    return net.join_matrices(plan.network, written)
