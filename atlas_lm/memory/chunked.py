"""The memory a chunk at a time: training, prefill and decode all run through `scan` (SPEC M7).

Inside a chunk every gradient is taken at W_ξ, so that all gates fold into one lower-triangular coefficient matrix and a
read is attention-like; per-token weights are never materialised:

    x W_t = a_t x W_ξ + (1 − a_t) x W_init − b_t x S_ξ − Σ_{i≤t} Γ[t,i] / D[t,i] (x·x_i) e_i
    (layer by layer, e_i the layer's error; a_t = Π α, b_t the weight of the momentum that the chunk began with)
    Γ = A · diag(η) · Θ · diag(1 − θ) · Ω,   A[t,s] = Π_{r=s+1..t} α_r,   Θ[s,j] = Π_{r=j+1..s} θ_r

The definitions of D, of the intake (1 − θ) and of everything else are those of `reference.py`.
"""

# B batch, H heads, T tokens, D head dim, F feature dim, C chunk, N = C + halo tokens of a block, K chunks

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory import network as net
from atlas_lm.memory.network import Gradient, Weights
from atlas_lm.memory.newton_schulz import newton_schulz
from atlas_lm.memory.state import MemoryState, Rule, Tokens, append, bounded, make_tail, map_tokens

_SMALLEST = 1e-12  # gates are clamped to it before their logarithm is taken


def scan(
    rule: Rule, state: MemoryState, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens
) -> tuple[Tensor, MemoryState]:
    """Read with every query while learning every token: (B, H, T, D) outputs and the state after the last token.

    `initial` are the weights (B, H, rows, columns) that a restart returns to. The calls may cut the tokens anywhere:
    outputs and state are those of one long call.
    """
    row = append(rule, state, tokens)
    length = row.k.size(2) - rule.halo
    count, filled = -(-length // rule.chunk), length % rule.chunk
    blocks = _blocks(rule, row, count)
    q_BHKCD, phi_q_BHKCF = (_queries(rule, x, state.filled, count) for x in (q_BHTD, phi_q_BHTF))
    keeps = _segments(rule, blocks)
    steps = _steps(rule, blocks, keeps)
    reading = rule.read == "token" and rule.update == "gradient"
    reads = _reads(rule, blocks, keeps) if reading else None

    weights, momentum = state.weights, state.momentum
    outputs = []
    for n in range(count):
        block = map_tokens(lambda x, n=n: x[:, :, n], blocks)
        keep = None if keeps is None else _Segments(*(x[:, :, n] for x in keeps))
        gradient = _gradient(rule, weights, initial, block, keep)
        total = None if rule.update == "newton_schulz" else _shared_curvature(rule, gradient, block, keep)
        at = None if reads is None else _Reads(*(x[:, :, n] for x in reads))
        base = _Base(weights, momentum, initial, keep)
        outputs.append(_read(rule, base, at, total, gradient, q_BHKCD[:, :, n], phi_q_BHKCF[:, :, n]))
        if n < count - 1 or filled == 0:
            step = _Steps(*(x[:, :, n] for x in steps))
            weights, momentum = _update(rule, base, step, total, gradient)
    y_BHTD = torch.cat(outputs, dim=2)[:, :, state.filled : length]
    return y_BHTD, MemoryState(weights, momentum, make_tail(rule, row, filled), filled)


def _blocks(rule: Rule, row: Tokens, count: int) -> Tokens:
    """Cut a row into chunks with their halos: (B, H, K, N, …). Zeros behind the end learn nothing."""
    missing = rule.halo + count * rule.chunk - row.k.size(2)

    def cut(x: Tensor) -> Tensor:
        x = nnf.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
        x = x.unfold(2, rule.chunk + rule.halo, rule.chunk)
        return x.mT if x.dim() == 5 else x

    return map_tokens(cut, row)


def _queries(rule: Rule, x_BHTD: Tensor, filled: int, count: int) -> Tensor:
    """Queries of the new tokens at their places in the chunks: (B, H, K, C, D)."""
    behind = count * rule.chunk - filled - x_BHTD.size(2)
    return nnf.pad(x_BHTD, (0, 0, filled, behind)).unflatten(2, (count, rule.chunk))


class _Segments(NamedTuple):
    """Where restarts cut a block. Tokens after one have W_init as their W_ξ, and see nothing from before it."""

    same: Tensor  # (B, H, K, N, N) bool: both tokens lie in one segment
    old: Tensor  # (B, H, K, N, 1) bool: in the segment that the chunk's W_ξ belongs to
    cut: Tensor  # (B, H, K, C) bool: restarts at this token


def _segments(rule: Rule, blocks: Tokens) -> _Segments | None:
    if blocks.restart is None:
        return None
    segment = blocks.restart.long().cumsum(-1)
    belongs = segment[..., rule.halo - 1 : rule.halo] if rule.halo else torch.zeros_like(segment[..., :1])
    same = segment.unsqueeze(-1) == segment.unsqueeze(-2)
    return _Segments(same, (segment == belongs).unsqueeze(-1), blocks.restart[..., rule.halo :])


class _Decays(NamedTuple):
    """The gates of the chunks' own tokens, each (B, H, K, C)."""

    eta: Tensor
    intake: Tensor  # 1 − θ
    retain: Tensor  # α, zero at restarts: nothing crosses them
    carry: Tensor  # θ, alike


def _decays(rule: Rule, blocks: Tokens, keeps: _Segments | None) -> _Decays:
    alpha, eta, theta = (gate[..., rule.halo :] for gate in blocks.gates[:3])
    if keeps is None:
        return _Decays(eta, 1 - theta, alpha, theta)
    return _Decays(eta, 1 - theta, alpha.masked_fill(keeps.cut, 0.0), theta.masked_fill(keeps.cut, 0.0))


def _products(decay_BHKC: Tensor) -> Tensor:
    """P[t, s] = Π_{r=s+1..t} decay_r, lower triangular: (…, C) → (…, C, C). A decay of exactly zero cuts exactly."""
    logs = decay_BHKC.clamp_min(_SMALLEST).log().cumsum(-1)
    difference = logs.unsqueeze(-1) - logs.unsqueeze(-2)
    C = decay_BHKC.size(-1)
    lower = torch.ones(C, C, dtype=torch.bool, device=decay_BHKC.device).tril()
    zeros = (decay_BHKC == 0).long().cumsum(-1)
    lower = lower & (zeros.unsqueeze(-1) == zeros.unsqueeze(-2))
    return difference.masked_fill(~lower, -torch.inf).exp()


def _from_end(x: Tensor, decay: Tensor) -> Tensor:
    """r_j = x_j + decay_{j+1} r_{j+1} from the last token back, in log₂ C steps: (…, C) → (…, C)."""
    decay = nnf.pad(decay[..., 1:], (0, 1))
    step = 1
    while step < x.size(-1):
        x = x + decay * nnf.pad(x[..., step:], (0, step))
        decay = decay * nnf.pad(decay[..., step:], (0, step))
        step *= 2
    return x


def _band(rule: Rule, blocks: Tokens, keeps: _Segments | None) -> Tensor:
    """Ω[j, i] = γ_i for j−c < i ≤ j: (B, H, K, C, N). SPEC M4."""
    N = rule.chunk + rule.halo
    ones = torch.ones(N, N, dtype=torch.bool, device=blocks.k.device)
    band = (ones.tril() & ones.triu(-rule.halo))[rule.halo :]
    gamma = blocks.gates.gamma.unsqueeze(-2)
    omega = torch.where(band, gamma, torch.zeros_like(gamma))
    return omega if keeps is None else omega * keeps.same[..., rule.halo :, :]


def _to_end(decay_BHKC: Tensor) -> Tensor:
    """Π_{r=s+1..C} decay_r for every s."""
    return nnf.pad(decay_BHKC[..., 1:], (0, 1), value=1.0).flip(-1).cumprod(-1).flip(-1)


class _Reads(NamedTuple):
    """Coefficients of a read at every token of a chunk."""

    weights: Tensor  # (B, H, K, C) a_t of W_ξ, 1 − a_t of W_init: zero and one behind a restart
    momentum: Tensor  # (B, H, K, C) b_t
    gradients: Tensor  # (B, H, K, C, N) Γ


def _reads(rule: Rule, blocks: Tokens, keeps: _Segments | None) -> _Reads:
    eta, intake, retain, carry = _decays(rule, blocks, keeps)
    A = _products(retain)
    folded = (A * eta.unsqueeze(-2)) @ _products(carry)  # A diag(η) Θ
    momentum = folded[..., 0] * carry[..., :1]
    weights = A[..., 0] * retain[..., :1]
    gradients = (folded * intake.unsqueeze(-2)) @ _band(rule, blocks, keeps)
    return _Reads(weights, momentum, gradients)


class _Steps(NamedTuple):
    """Coefficients of W and S at a chunk's end."""

    weights: Tensor  # (B, H, K) a_C of W_ξ, 1 − a_C of W_init
    momentum: Tensor  # (B, H, K) of S_ξ in W
    carry: Tensor  # (B, H, K) of S_ξ in S
    eta: Tensor  # (B, H, K) mean write strength, for Newton–Schulz
    on_weights: Tensor  # (B, H, K, N) of each gradient in W
    on_momentum: Tensor  # (B, H, K, N) of each gradient in S


def _steps(rule: Rule, blocks: Tokens, keeps: _Segments | None) -> _Steps:
    """The last row of what `_reads` returns, without its C×C matrices: a global memory has long chunks."""
    eta, intake, retain, carry = _decays(rule, blocks, keeps)
    retain_to_end, carry_to_end = _to_end(retain), _to_end(carry)
    on_intake = _from_end(retain_to_end * eta, carry)
    last = torch.ones_like(eta) if keeps is None else keeps.same[..., rule.halo :, -1].to(eta)
    omega = _band_sum(rule, blocks, keeps, torch.stack([on_intake, carry_to_end], -2) * intake.unsqueeze(-2))
    return _Steps(
        retain_to_end[..., 0] * retain[..., 0],
        on_intake[..., 0] * carry[..., 0],
        carry_to_end[..., 0] * carry[..., 0],
        (eta * last).sum(-1) / last.sum(-1),
        omega[..., 0, :],
        omega[..., 1, :],
    )


def _band_sum(rule: Rule, blocks: Tokens, keeps: _Segments | None, x_BHKRC: Tensor) -> Tensor:
    """x Ω, the last rows of it: (B, H, K, R, C) → (B, H, K, R, N)."""
    if rule.context == 1 and keeps is None:
        return x_BHKRC * blocks.gates.gamma.unsqueeze(-2)
    if keeps is not None:
        return x_BHKRC @ _band(rule, blocks, keeps)
    windows = nnf.pad(x_BHKRC, (rule.halo, rule.halo)).unfold(-1, rule.context, 1).sum(-1)
    return windows * blocks.gates.gamma.unsqueeze(-2)


class _Base(NamedTuple):
    """What a chunk starts from."""

    weights: Weights
    momentum: Weights
    initial: Weights
    keep: _Segments | None


def _gradient(rule: Rule, weights: Weights, initial: Weights, block: Tokens, keep: _Segments | None) -> Gradient:
    """∇ℓ of the block's tokens at W_ξ, at W_init for those behind a restart."""
    g = net.gradient(rule.network, weights, block.k, block.phi, block.v)
    if keep is None:
        return g
    new = net.gradient(rule.network, initial, block.k, block.phi, block.v)

    def pick(old: tuple[Tensor, ...], fresh: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.where(keep.old, x, y) for x, y in zip(old, fresh, strict=True))

    sensitivity = torch.where(keep.old.squeeze(-1), g.sensitivity, new.sensitivity)
    return Gradient(pick(g.inputs, new.inputs), pick(g.errors, new.errors), sensitivity)


@torch.no_grad()
def _shared_curvature(rule: Rule, of: Gradient, block: Tokens, keep: _Segments | None) -> Tensor:
    """D[t, i] = c (κ_ii + Σ_{j≤t, j≠i} γ_j κ_ij) for every t of the chunk, its end alone where only that is read.

    (B, H, C or 1, N). See `reference.py`.
    """
    kappa = net.curvature(of)
    if keep is not None:
        kappa = kappa * keep.same
    gamma = block.gates.gamma
    own = kappa.diagonal(dim1=-2, dim2=-1) * (1 - gamma)
    if rule.read == "chunk":
        shared = gamma.unsqueeze(-2) @ kappa
    else:
        N = kappa.size(-1)
        seen = torch.ones(N, N, dtype=kappa.dtype, device=kappa.device).tril()[rule.halo :]
        shared = (seen * gamma.unsqueeze(-2)) @ kappa
    return (rule.context * (own.unsqueeze(-2) + shared)).clamp_min(net.SMALLEST_CURVATURE)


def _read(
    rule: Rule,
    base: _Base,
    at: _Reads | None,
    total_BHCN: Tensor | None,
    gradient: Gradient,
    q_BHCD: Tensor,
    phi_q_BHCF: Tensor,
) -> Tensor:
    """M(W_t; q_t) for the tokens of a chunk: (B, H, C, D)."""
    old = None if base.keep is None else base.keep.old[..., rule.halo :, :]

    def at_start(layer: int, x: Tensor) -> Tensor:
        y = x @ base.weights[layer]
        return y if old is None else torch.where(old, y, x @ base.initial[layer])

    if at is None:
        return net.read(rule.network, at_start, q_BHCD, phi_q_BHCF)
    assert total_BHCN is not None, "a read at W_t needs the curvature bound"
    gamma_BHCN = at.gradients / total_BHCN

    def inside(layer: int, x: Tensor) -> Tensor:
        initial = x @ base.initial[layer]
        y = initial + at.weights.unsqueeze(-1) * (x @ base.weights[layer] - initial)
        y = y - at.momentum.unsqueeze(-1) * (x @ base.momentum[layer])
        return y - (gamma_BHCN * (x @ gradient.inputs[layer].mT)) @ gradient.errors[layer]

    return net.read(rule.network, inside, q_BHCD, phi_q_BHCF)


def _update(
    rule: Rule, base: _Base, step: _Steps, total_BHCN: Tensor | None, gradient: Gradient
) -> tuple[Weights, Weights]:
    """W and S at the chunk's end."""

    def mix(coefficient_BH: Tensor, w: Tensor) -> Tensor:
        return coefficient_BH[..., None, None] * w

    normal = 1.0 if total_BHCN is None else 1.0 / total_BHCN[..., -1, :]
    on_momentum = (step.on_momentum * normal).unsqueeze(-1)
    on_weights = (step.on_weights * normal).unsqueeze(-1)
    weights, momentum = [], []
    for l, (x, e) in enumerate(zip(gradient.inputs, gradient.errors, strict=True)):
        carried = mix(step.carry, base.momentum[l])
        kept = base.initial[l] + mix(step.weights, base.weights[l] - base.initial[l])
        if rule.update == "newton_schulz":
            momentum.append(carried + x.mT @ (on_momentum * e))
            weights.append(kept)
        else:
            both = x.mT @ torch.cat([on_momentum * e, on_weights * e], dim=-1)
            into_momentum, into_weights = both.chunk(2, dim=-1)
            momentum.append(carried + into_momentum)
            weights.append(kept - mix(step.momentum, base.momentum[l]) - into_weights)
    if rule.update == "newton_schulz":
        split = net.split_matrices(rule.network, tuple(momentum))
        write = net.join_matrices(rule.network, [newton_schulz(s, rule.newton_schulz_steps) for s in split])
        weights = [w - mix(step.eta, u) for w, u in zip(weights, write, strict=True)]
    return bounded(rule, tuple(weights)), tuple(momentum)
