"""One chunk of the memory: learn, read, update (M7). Without autograd; `backward.py` is the way back.

w = W_ξ − W_init lies above s = S_ξ in one matrix z per layer, so that few products pass over it. Layer by layer, with
inputs x (x₁ = φ(k), x₂ = h), errors e and the coefficients ω/D and Γ/D of `coefficients.py`:

    learn    p = r + x₁ w₁    h = act(p)    e₂ = h (W + w₂) − v    e₁ = act′(p) ⊙ e₂ (W + w₂)ᵀ
    read     p′ = r′ + [a x′, −b x′] z − (Γ/D ⊙ x′xᵀ) e      with x′ = φ(q), then the hidden activations of the read
    update   z ← [[α, −β], [0, θ]] z + [−ω_w/D x, ω_s/D x]ᵀ e

r and r′ are the products of keys and queries with W_init. After a restart inside the chunk `in_start_segment` is 0, and
w is not seen.
"""

# G batch × heads, K chunks, C chunk, N = C + halo tokens of a block, F feature dim, P pre-activations, E hidden dim
# of layer l: R rows (F or E), Q columns (P or D)

import torch
from torch import Tensor

from atlas_lm.memory import network as net
from atlas_lm.memory.loop.types import LoopConfig, LoopInputs, Maybe, Record
from atlas_lm.memory.newton_schulz import newton_schulz

SMALL = 64  # up to so many tokens a product is bound by the matrix that it adds to, and is done in that one's precision


def add_outer(target: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """target += aᵀ b, in place: (G, R, Q), (G, N, R), (G, N, Q)."""
    if a.size(1) <= SMALL or a.dtype == target.dtype:
        return target.baddbmm_(a.to(target.dtype).mT, b.to(target.dtype))
    return target.add_(torch.bmm(a.mT, b))


def twice(x: Tensor, by: Tensor) -> Tensor:
    """[by₁ x, by₂ x]: (G, N, R), (G, 2, N, 1) → (G, N, 2R)."""
    return torch.cat([x * by[:, 0], x * by[:, 1]], dim=-1)


def masked(x: Tensor, in_start_segment: Maybe) -> Tensor:
    return x if in_start_segment is None else x * in_start_segment


def masks(config: LoopConfig, x: LoopInputs, n: int) -> tuple[Maybe, Maybe]:
    """`in_start_segment` of the block and of the chunk's own tokens, to multiply with."""
    if x.in_start_segment is None:
        return None, None
    in_start_segment = x.in_start_segment[:, n].to(config.operands)
    return in_start_segment, in_start_segment[:, in_start_segment.size(1) - x.phi_q.size(2) :]


def learn_and_read(config: LoopConfig, x: LoopInputs, n: int, states: list[Tensor]) -> tuple[Tensor, Record]:
    """Learn and read a chunk."""
    act, low = config.network.activation, config.operands
    in_start_segment, queries_in_start = masks(config, x, n)
    z = [state.to(low) for state in states]
    w = [state[:, : state.size(1) // 2] for state in z]
    w0: Maybe = None if x.initial_out is None else x.initial_out.to(low)
    phi, phi_q = x.phi[:, n], x.phi_q[:, n]
    pre = torch.baddbmm(x.by_initial[:, n], masked(phi, in_start_segment), w[0])
    inputs: tuple[Tensor, ...] = (phi,)
    errors: tuple[Tensor, ...] = (pre,)
    slopes = back = total = None
    if n < config.complete or x.read_coef is not None:  # a read at W_ξ needs no gradient of an unfinished chunk
        if act is None:
            errors = (pre - x.v[:, n],)
        else:
            hidden, slopes = act.learn(pre)
            if in_start_segment is None:
                w_out = w0 + w[1]
                error = torch.baddbmm(x.v[:, n], hidden, w_out, beta=-1)
                back = error @ w_out.mT
            else:
                error = torch.baddbmm(hidden @ w0 - x.v[:, n], hidden * in_start_segment, w[1])
                back = torch.baddbmm(error @ w0.mT, error * in_start_segment, w[1].mT)
            inputs = (phi, hidden)
            errors = ((slopes.unflatten(-1, (act.width, -1)) * back.unsqueeze(-2)).flatten(-2), error)
        if config.update == "gradient":
            total = _shared_curvature(config, x, n, inputs, slopes, w0, w)
    grad_coef = None
    if x.read_coef is None or total is None:
        read_pre = torch.baddbmm(x.q_by_initial[:, n], masked(phi_q, queries_in_start), w[0])
    else:
        grad_coef, read_coef = (x.grad_coef[:, n] / total).to(low), x.read_coef[:, n].unsqueeze(-1).to(low)
        read_pre = torch.baddbmm(x.q_by_initial[:, n], twice(phi_q, read_coef), z[0])
        read_pre.baddbmm_(grad_coef * x.scores[:, n], errors[0], alpha=-1)
    record = Record(inputs, errors, pre, slopes, back, total, grad_coef, read_pre, None)
    if act is None:
        return read_pre, record
    read_hidden = act.forward(read_pre)
    if grad_coef is None:
        y = (
            torch.baddbmm(read_hidden @ w0, masked(read_hidden, queries_in_start), w[1])
            if queries_in_start is not None
            else (read_hidden @ (w0 + w[1]))
        )
    else:
        y = torch.baddbmm(read_hidden @ w0, twice(read_hidden, read_coef), z[1])
        y.baddbmm_(grad_coef * (read_hidden @ hidden.mT), errors[1], alpha=-1)
    return y, record._replace(read_hidden=read_hidden)


def _shared_curvature(
    config: LoopConfig, x: LoopInputs, n: int, inputs: tuple[Tensor, ...], slopes: Maybe, w0: Maybe, w: list[Tensor]
) -> Tensor:
    """D[t, i] = c (κ_ii + Σ_{j≤t, j≠i} γ_j κ_ij) for every t of the chunk, its end alone where only that is read.

    (G, C or 1, N). See `reference.py`.
    """
    phi, in_start_segment = inputs[0], x.in_start_segment
    sensitivity = phi[..., 0]
    if slopes is not None and w0 is not None and config.network.activation is not None:
        squared = slopes.square().unflatten(-1, (config.network.activation.width, -1)).sum(-2)
        bound = net.norm_bound(squared, w0 + w[1])
        if in_start_segment is not None:
            bound = torch.where(in_start_segment[:, n].squeeze(-1), bound, net.norm_bound(squared, w0))
        sensitivity = bound.sqrt()
    kappa = net.curvature(net.Gradient(inputs, (), sensitivity), phi @ phi.mT)
    if x.same_segment is not None:
        kappa = kappa * x.same_segment[:, n]
    gamma = x.gamma[:, n].to(kappa.dtype)
    queries_in_start = kappa.diagonal(dim1=-2, dim2=-1) * (1 - gamma)
    if x.read_coef is None:
        shared = gamma.unsqueeze(-2) @ kappa
    else:
        C, N = x.phi_q.size(2), kappa.size(-1)
        seen = torch.ones(N, N, dtype=kappa.dtype, device=kappa.device).tril()[N - C :]
        shared = seen @ (gamma.unsqueeze(-1) * kappa)
    return (
        (config.context * (queries_in_start.unsqueeze(-2) + shared)).clamp_min(net.SMALLEST_CURVATURE).to(x.gamma.dtype)
    )


def write_weights(x: LoopInputs, n: int, record: Record) -> Tensor:
    """ω/D (G, 2, N, 1), in the precision of the error."""
    write_coef = x.write_coef[:, n] if record.total is None else x.write_coef[:, n] / record.total[:, -1:]
    return write_coef.unsqueeze(-1).to(record.errors[0].dtype)


def mix(coefficients: Tensor, state: Tensor) -> Tensor:
    """(G, 2, 2) times the halves w and s of a state (G, 2R, Q).

    Number by number: a product of float32 matrices may be rounded to ten bits on a GPU, and then nothing is forgotten.
    """
    w, s = (half(state, which).unsqueeze(1) for which in (0, 1))
    by_w, by_s = coefficients[..., None, None].unbind(2)
    return torch.addcmul(by_w * w, by_s, s).flatten(1, 2)


def along(a: Tensor, b: Tensor) -> Tensor:
    """⟨half of a, half of b⟩ for each two halves: (G, 2R, Q) twice → (G, 2, 2). The gradient of `mix`, alike."""
    rows = [[(half(a, i) * half(b, j)).sum((-2, -1)) for j in (0, 1)] for i in (0, 1)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def update(
    config: LoopConfig, x: LoopInputs, n: int, states: list[Tensor], record: Record
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The states after a chunk, and by how much the ball has scaled the matrices of each layer; () where by nothing.

    On a GPU nothing is looked at: there they are multiplied by 1, which changes no bit.
    """
    write_coef = write_weights(x, n, record)
    after = [
        add_outer(mix(x.decay[:, n], z), twice(inputs, write_coef), error)
        for z, inputs, error in zip(states, record.inputs, record.errors, strict=True)
    ]
    if config.update == "newton_schulz":
        for z, u in zip(after, orthogonal(config, [half(z, 1) for z in after]), strict=True):
            half(z, 0).addcmul_(x.eta[:, n, None, None], u, value=-1)
    change = tuple(half(z, 0) for z in after)
    if config.radius == float("inf") or net.surely_inside(change, config.radius):
        return after, ()
    scales = net.scales(config.network, change, config.radius)
    for w, scale in zip(change, scales, strict=True):
        w.copy_(net.scaled(w, scale))
    return after, tuple(scales)


def half(state: Tensor, which: int) -> Tensor:
    """The view of w (0) or s (1)."""
    return state.unflatten(1, (2, -1))[:, which]


def orthogonal(config: LoopConfig, momentum: list[Tensor]) -> tuple[Tensor, ...]:
    """U(s) of every matrix."""
    split = net.split_matrices(config.network, tuple(s.to(config.operands) for s in momentum))
    written = [newton_schulz(s, config.newton_schulz_steps).to(momentum[0].dtype) for s in split]
    return net.join_matrices(config.network, written)
