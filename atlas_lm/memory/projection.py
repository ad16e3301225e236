"""Persistent memory and the Q–K projection (M9, M10; TNT App. C, eq 13–15).

    M_t = M_persistent + Σ_{i≤t} k_i k_iᵀ,  n_t = norm_persistent + Σ_{i≤t} ‖k_i‖²,  q'_t = M_t q_t / n_t, to unit norm

A query is moved into the space of the keys that the shard has seen: a memory answers only what it was asked in its own
terms. At a reset both M and n go back to the persistent values: without the denominator the persistent keys would be
either drowned or too loud.
"""

# B batch, H heads, T tokens, D head dim, P persistent keys, C block

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.features import unit

BLOCK = 64  # tokens at a time: the result does not depend on it


class ProjectionState(NamedTuple):
    """The running sums of one shard, in at least float32."""

    M: Tensor  # (B, H, D, D)
    n: Tensor  # (B, H)


def persistent_state(keys_HPD: Tensor, batch: int) -> ProjectionState:
    """M_persistent and norm_persistent, derived from the keys on use so that they cannot go stale (M10)."""
    wide = torch.promote_types(keys_HPD.dtype, torch.float32)
    keys_HPD = keys_HPD.to(wide)
    M_HDD = (keys_HPD.mT @ keys_HPD).to(wide)
    n_H = keys_HPD.square().sum(dim=(-2, -1))
    return ProjectionState(M_HDD.expand(batch, -1, -1, -1), n_H.expand(batch, -1))


def project(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    state: ProjectionState,
    persistent: ProjectionState,
    restart_BHT: Tensor | None = None,
) -> tuple[Tensor, ProjectionState]:
    """Project every query onto the keys up to its own: (B, H, T, D) of unit norm, and the state after the last token.

    Computed as q M_ξ + tril(q Kᵀ) K block by block: no D×D matrix per token. `restart_BHT` (bool) marks the tokens at
    which M and n go back to `persistent`.
    """
    wide = torch.promote_types(k_BHTD.dtype, torch.float32)  # sums over thousands of tokens
    state, persistent = (ProjectionState(sums.M.to(wide), sums.n.to(wide)) for sums in (state, persistent))
    if restart_BHT is None:
        return _all_blocks(q_BHTD, k_BHTD, state)
    outputs = []
    for start in range(0, k_BHTD.size(2), BLOCK):
        now = slice(start, start + BLOCK)
        y, state = _block(q_BHTD[:, :, now], k_BHTD[:, :, now], state, persistent, restart_BHT[:, :, now])
        outputs.append(y)
    return torch.cat(outputs, dim=2), state


def _all_blocks(q_BHTD: Tensor, k_BHTD: Tensor, state: ProjectionState) -> tuple[Tensor, ProjectionState]:
    """Without restarts M_ξ of every block is a running sum. n_t cancels out of q', which has unit norm."""
    T = k_BHTD.size(2)
    count = -(-T // BLOCK)
    C = T if count == 1 else BLOCK  # decoding: no more than the tokens that are there
    missing = count * C - T
    q, k = (nnf.pad(x, (0, 0, 0, missing)) if missing else x for x in (q_BHTD, k_BHTD))
    q, k = (x.unflatten(2, (count, C)) for x in (q, k))
    gram = (k.mT @ k).to(state.M)
    # of the blocks before alone: a block's own keys, added and taken away again, would leave their rounding after
    before = state.M.unsqueeze(2) + nnf.pad(_running_sum(gram[:, :, :-1]), (0, 0, 0, 0, 1, 0))
    scores = (q @ k.mT).tril()
    projected = q @ before.to(q.dtype) + scores @ _finite(k)
    y = unit(projected.to(q_BHTD.dtype)).flatten(2, 3)[:, :, :T]
    n = state.n + k_BHTD.square().sum(dim=(-2, -1))
    return y, ProjectionState(before[:, :, -1] + gram[:, :, -1], n)


def _running_sum(x_BHKDD: Tensor) -> Tensor:
    """Over the blocks, in log₂ K steps of one order: a cumulative sum has none on a GPU."""
    step = 1
    while step < x_BHKDD.size(2):
        x_BHKDD = x_BHKDD + nnf.pad(x_BHKDD[:, :, :-step], (0, 0, 0, 0, step, 0))
        step *= 2
    return x_BHKDD


def _finite(k: Tensor) -> Tensor:
    """Keys for a masked product, where 0 · NaN would reach earlier tokens. Later ones have the key's NaN as score."""
    return k.nan_to_num(0.0, 0.0, 0.0)


def _block(
    q_BHCD: Tensor, k_BHCD: Tensor, state: ProjectionState, persistent: ProjectionState, restart: Tensor
) -> tuple[Tensor, ProjectionState]:
    C = q_BHCD.size(2)
    seen = torch.ones(C, C, dtype=torch.bool, device=q_BHCD.device).tril()
    segment = restart.long().cumsum(-1)
    seen = seen & (segment.unsqueeze(-1) == segment.unsqueeze(-2))
    fresh = segment > 0
    low = q_BHCD.dtype
    carried = torch.where(fresh.unsqueeze(-1), q_BHCD @ persistent.M.to(low), q_BHCD @ state.M.to(low))
    n_BHC = torch.where(fresh, persistent.n.unsqueeze(-1), state.n.unsqueeze(-1))
    last = fresh[..., -1]
    base = ProjectionState(
        torch.where(last[..., None, None], persistent.M, state.M), torch.where(last, persistent.n, state.n)
    )
    weight_BHC = (segment == segment[..., -1:]).to(k_BHCD)
    scores = (q_BHCD @ k_BHCD.mT).masked_fill(~seen, 0.0)
    squares_BHC = k_BHCD.square().sum(-1)
    n_BHC = n_BHC + torch.where(seen, squares_BHC.unsqueeze(-2), 0.0).sum(-1)
    projected = (carried + scores @ _finite(k_BHCD)) / n_BHC.clamp_min(1e-8).unsqueeze(-1)
    kept = k_BHCD * weight_BHC.unsqueeze(-1)
    state = ProjectionState(base.M + kept.mT @ k_BHCD, base.n + (weight_BHC * squares_BHC).sum(-1))
    return unit(projected.to(q_BHCD.dtype)), state
