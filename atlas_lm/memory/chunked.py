"""The memory a chunk at a time: training, prefill and decode all run through `scan` (SPEC M7).

Inside a chunk every gradient is taken at W_ξ, so that all gates fold into one lower-triangular coefficient matrix and a
read is attention-like; per-token weights are never materialised:

    x W_t = x W_init + a_t x (W_ξ − W_init) − b_t x S_ξ − Σ_{i≤t} Γ[t,i] / D[t,i] (x·x_i) e_i
    (layer by layer, e_i the layer's error; a_t = Π α, b_t the weight of the momentum that the chunk began with)
    Γ = A · diag(η) · Θ · diag(1 − θ) · Ω,   A[t,s] = Π_{r=s+1..t} α_r,   Θ[s,j] = Π_{r=j+1..s} θ_r

The definitions of D, of the intake (1 − θ) and of everything else are those of `reference.py`.
"""

# B batch, H heads, T tokens, D head dim, F feature dim, C chunk, N = C + halo tokens of a block, K chunks

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

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

    `initial` is W_init (H, rows, columns) per layer. The calls may cut the tokens anywhere:
    outputs and state are those of one long call.
    """
    row = append(rule, state, tokens)
    length = row.k.size(2) - rule.halo
    count, filled = -(-length // rule.chunk), length % rule.chunk
    tail = make_tail(rule, row, filled)
    if length < rule.chunk:  # decoding: no more than the tokens that are there
        rule = rule._replace(chunk=length)
    blocks = _blocks(rule, row, count)
    q_BHKCD, phi_q_BHKCF = (_queries(rule, x, state.filled, count) for x in (q_BHTD, phi_q_BHTF))
    keeps = _segments(rule, blocks)
    steps = _steps(rule, blocks, keeps)
    reads = _reads(rule, blocks, keeps) if rule.read == "token" and rule.update == "gradient" else None
    # what does not depend on the fast weights is computed for all chunks at once
    by_initial = _Pair(_times_initial(blocks.phi, initial[0]), _times_initial(phi_q_BHKCF, initial[0]))
    scores = None if reads is None else phi_q_BHKCF @ blocks.phi.mT

    each = _Each(*(_unbind(x) for x in (blocks, q_BHKCD, phi_q_BHKCF, keeps, steps, reads, by_initial, scores)))
    change, momentum = state.change, state.momentum
    outputs = []
    for n in range(count):
        now = _Chunk(rule, _low(change), _low(momentum), initial, each.by_initial[n], each.keeps[n], each.blocks[n])
        ends = n < count - 1 or filled == 0
        learned = _learn(now) if ends or reads is not None else None  # a read at W_ξ needs no gradient
        outputs.append(_read(now, each.reads[n], each.scores[n], learned, each.q[n], each.phi_q[n]))
        if ends and learned is not None:
            change, momentum = _update(rule, change, momentum, each.steps[n], learned)
    y_BHTD = torch.cat(outputs, dim=2)[:, :, state.filled : length]
    return y_BHTD, MemoryState(change, momentum, tail, filled)


class _Each(NamedTuple):
    """What the loop over chunks takes, one entry a chunk."""

    blocks: list[Tokens]
    q: list[Tensor]
    phi_q: list[Tensor]
    keeps: list[_Segments | None]
    steps: list[_Steps]
    reads: list[_Reads | None]
    by_initial: list[_Pair]
    scores: list[Tensor | None]


def _unbind(x: Any) -> Any:
    """A structure of (B, H, K, …) tensors as K structures.

    By one unbind a tensor: the gradient of K slices would be K tensors of full size, quadratic in the sequence.
    """
    if isinstance(x, Tensor):
        return list(x.unbind(2))
    if isinstance(x, tuple):
        return [type(x)(*fields) for fields in zip(*(_unbind(field) for field in x), strict=False)]
    return _Repeat()


class _Repeat:
    """None for every chunk."""

    def __getitem__(self, n: int) -> None:
        return None

    def __iter__(self) -> Iterator[None]:
        return itertools.repeat(None)


def _blocks(rule: Rule, row: Tokens, count: int) -> Tokens:
    """Cut a row into chunks with their halos: (B, H, K, N, …). Zeros behind the end learn nothing."""
    missing = rule.halo + count * rule.chunk - row.k.size(2)

    def cut(x: Tensor) -> Tensor:
        if missing:
            x = nnf.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
        if rule.halo == 0:
            return x.unflatten(2, (count, rule.chunk))
        x = x.unfold(2, rule.chunk + rule.halo, rule.chunk)
        return x.mT.contiguous() if x.dim() == 5 else x  # columns in a row: products of transposed views are slow

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

    weights: Tensor  # (B, H, K, C) a_t of W_ξ − W_init; zero behind a restart
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

    weights: Tensor  # (B, H, K) a_C of W_ξ − W_init
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


class _Pair(NamedTuple):
    """Something of the keys and of the queries."""

    keys: Tensor
    queries: Tensor


def _times_initial(x_BHKNF: Tensor, w_HFP: Tensor) -> Tensor:
    """x W_init, head by head, over all sequences and chunks at once."""
    B, _, K, N, _ = x_BHKNF.shape
    y = x_BHKNF.transpose(0, 1).flatten(1, 3) @ w_HFP
    return y.unflatten(1, (B, K, N)).transpose(0, 1)


def _low(weights: Weights) -> Weights:
    """Fast weights as operands: in autocast's precision, cast once; the state itself stays wide."""
    device = weights[0].device.type
    if torch.is_autocast_enabled(device):
        return tuple(w.to(torch.get_autocast_dtype(device)) for w in weights)
    return weights


class _Chunk(NamedTuple):
    """One chunk and the weights that it starts from."""

    rule: Rule
    change: Weights  # W_ξ − W_init
    momentum: Weights  # S_ξ
    initial: Weights  # W_init (H, rows, columns)
    by_initial: _Pair  # features times W_init's first layer
    keep: _Segments | None
    block: Tokens


class _Learned(NamedTuple):
    """What a chunk teaches."""

    gradient: Gradient
    total: Tensor | None  # D (B, H, C or 1, N); None for Newton–Schulz


def _learn(now: _Chunk) -> _Learned:
    layers = _layers(now, now.by_initial.keys, 0)
    gradient = net.gradient(now.rule.network, layers, now.block.k, now.block.phi, now.block.v)
    return _Learned(gradient, None if now.rule.update == "newton_schulz" else _shared_curvature(now, gradient))


def _layers(now: _Chunk, first: Tensor, skip: int) -> list[net.Layer]:
    """The network at W_ξ, at W_init for tokens behind a restart; `first` is its first layer's product with W_init.

    For the tokens of the block from `skip` on.
    """
    old = None if now.keep is None else now.keep.old[..., skip:, :]

    def begin(x: Tensor) -> Tensor:
        y = x @ now.change[0]
        return first + (y if old is None else y * old)

    def no_way_back(e: Tensor) -> Tensor:
        raise AssertionError("errors end at the first layer")

    layers = [net.Layer(begin, no_way_back, no_way_back)]
    if len(now.change) == 1:
        return layers
    initial, change = now.initial[1].to(now.change[1].dtype), now.change[1]
    if old is None:
        return [*layers, net.plain_layer(initial + change)]

    def both(x: Tensor, w0: Tensor, w: Tensor) -> Tensor:
        return x @ w0 + (x @ w) * old

    def squares(squared: Tensor) -> Tensor:
        at_change = net.norm_bound(squared, initial + change)
        return torch.where(old.squeeze(-1), at_change, net.norm_bound(squared, initial.expand_as(change)))

    second = net.Layer(lambda x: both(x, initial, change), lambda e: both(e, initial.mT, change.mT), squares)
    return [*layers, second]


@torch.no_grad()
def _shared_curvature(now: _Chunk, of: Gradient) -> Tensor:
    """D[t, i] = c (κ_ii + Σ_{j≤t, j≠i} γ_j κ_ij) for every t of the chunk, its end alone where only that is read.

    (B, H, C or 1, N). See `reference.py`.
    """
    kappa = net.curvature(of, now.block.phi @ now.block.phi.mT)
    if now.keep is not None:
        kappa = kappa * now.keep.same
    gamma = now.block.gates.gamma
    own = kappa.diagonal(dim1=-2, dim2=-1) * (1 - gamma)
    if now.rule.read == "chunk":
        shared = gamma.unsqueeze(-2) @ kappa
    else:
        N = kappa.size(-1)
        seen = torch.ones(N, N, dtype=kappa.dtype, device=kappa.device).tril()[now.rule.halo :]
        shared = seen @ (gamma.unsqueeze(-1).to(kappa.dtype) * kappa)
    return (now.rule.context * (own.unsqueeze(-2) + shared)).clamp_min(net.SMALLEST_CURVATURE)


def _read(
    now: _Chunk, at: _Reads | None, scores_BHCN: Tensor | None, learned: _Learned | None, q: Tensor, phi_q: Tensor
) -> Tensor:
    """M(W_t; q_t) for the tokens of a chunk, M(W_ξ; q_t) without coefficients `at`: (B, H, C, D)."""
    if at is None or scores_BHCN is None or learned is None or learned.total is None:
        layers = _layers(now, now.by_initial.queries, now.rule.halo)
        return net.read(now.rule.network, lambda l, x: layers[l].forward(x), q, phi_q)
    gradient, total_BHCN = learned.gradient, learned.total
    gamma_BHCN = (at.gradients / total_BHCN).to(scores_BHCN.dtype)
    a_BHC1, b_BHC1 = (x.unsqueeze(-1).to(scores_BHCN.dtype) for x in (at.weights, at.momentum))

    def product(layer: int, x: Tensor) -> Tensor:
        if layer == 0:
            initial, alike = now.by_initial.queries, scores_BHCN
        else:
            initial, alike = x @ now.initial[layer].to(x.dtype), x @ gradient.inputs[layer].mT
        y = initial + a_BHC1 * (x @ now.change[layer]) - b_BHC1 * (x @ now.momentum[layer])
        return y - (gamma_BHCN * alike) @ gradient.errors[layer]

    return net.read(now.rule.network, product, q, phi_q)


def _update(rule: Rule, change: Weights, momentum: Weights, step: _Steps, learned: _Learned) -> tuple[Weights, Weights]:
    """W − W_init and S at the chunk's end."""
    gradient, total_BHCN = learned
    keep, drift, carry = (x[..., None, None] for x in (step.weights, step.momentum, step.carry))
    normal = 1.0 if total_BHCN is None else 1.0 / total_BHCN[..., -1, :]
    low = gradient.errors[0].dtype
    on_momentum = (step.on_momentum * normal).unsqueeze(-1).to(low)
    on_weights = (step.on_weights * normal).unsqueeze(-1).to(low)
    new_change, new_momentum = [], []
    for x, e, w, s in zip(gradient.inputs, gradient.errors, change, momentum, strict=True):
        new_momentum.append(torch.addcmul((x.mT @ (on_momentum * e)).to(s.dtype), carry, s))
        if rule.update == "newton_schulz":
            new_change.append(keep * w)
        else:
            minus = torch.addcmul((x.mT @ (on_weights * e)).to(s.dtype), drift, s)
            new_change.append(torch.addcmul(-minus, keep, w))
    if rule.update == "newton_schulz":
        split = net.split_matrices(rule.network, tuple(new_momentum))
        write = net.join_matrices(rule.network, [newton_schulz(s, rule.newton_schulz_steps) for s in split])
        eta = step.eta[..., None, None]
        new_change = [torch.addcmul(w, eta, u.to(w.dtype), value=-1) for w, u in zip(new_change, write, strict=True)]
    return bounded(rule, tuple(new_change)), tuple(new_momentum)
