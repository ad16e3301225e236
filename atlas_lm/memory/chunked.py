"""The memory a chunk at a time: training, prefill and decode all run through `scan` (SPEC M7).

Inside a chunk every gradient is taken at W_ξ, so that all gates fold into one lower-triangular coefficient matrix and a
read is attention-like; per-token weights are never materialised:

    x W_t = x W_init + a_t x (W_ξ − W_init) − b_t x S_ξ − Σ_{i≤t} Γ[t,i] / D[t,i] (x·x_i) e_i
    (layer by layer, e_i the layer's error; Γ, a_t and b_t: `coefficients.py`)

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

from atlas_lm.memory import coefficients as fold
from atlas_lm.memory import network as net
from atlas_lm.memory.coefficients import Reads, Segments, Steps
from atlas_lm.memory.network import Gradient, Weights
from atlas_lm.memory.newton_schulz import newton_schulz
from atlas_lm.memory.state import MemoryState, Rule, Tokens, append, bounded, make_tail, map_tokens


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
    keeps = fold.segments(rule, blocks)
    steps = fold.steps(rule, blocks, keeps)
    reads = fold.reads(rule, blocks, keeps) if rule.read == "token" and rule.update == "gradient" else None
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
    keeps: list[Segments | None]
    steps: list[Steps]
    reads: list[Reads | None]
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
    keep: Segments | None
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
    now: _Chunk, at: Reads | None, scores_BHCN: Tensor | None, learned: _Learned | None, q: Tensor, phi_q: Tensor
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


def _update(rule: Rule, change: Weights, momentum: Weights, step: Steps, learned: _Learned) -> tuple[Weights, Weights]:
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
