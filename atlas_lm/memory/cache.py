"""Cached states of past shards, read through a gate (gated residual memory of Memory Caching, arXiv 2602.24281).

At the end of each shard the global memory's weights are kept beside the mean key of the shard, the last N of them:

    p_t = softmax([b_t, u_t·m_1, …, u_t·m_N])        m_i the mean key of shard i; u_t and b_t linear in x_t
    y_t = p_t0 M(W_t; q_t) + Σ_i p_ti M(W_i; q_t)

What the memory has forgotten since can still be read there, at the price of N reads a token. A restart hides every
state that was kept before it. A stream that does not write keeps none.
"""

# B batch, H heads, T tokens, D head dim, F feature dim, N states that are kept, n those that are there

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from atlas_lm.memory import network as net
from atlas_lm.memory.network import Weights
from atlas_lm.memory.state import MemoryState, Rule, Tokens, fit, map_tokens, without_autocast

Form = Callable[[Rule, MemoryState, Weights, Tensor, Tensor, Tokens], tuple[Tensor, MemoryState]]


class Snapshot(NamedTuple):
    """A memory as it was at the end of a shard; stacked in a state: (B, N, …)."""

    change: Weights  # W − W_init, per layer (B, H, rows, columns)
    key: Tensor  # (B, H, D) mean of the shard's keys
    alive: Tensor  # (B, H) bool: no restart since


class Cache(NamedTuple):
    """What a stream keeps of the shards before: of constant size."""

    snapshots: Snapshot  # the newest last; slots that are not used yet come first
    used: int
    key_sum: Tensor  # (B, H, D) of the tokens written since the last snapshot or restart
    written: Tensor  # (B, H) their number
    seen: int  # tokens since the last shard began


class Asked(NamedTuple):
    """What the hidden states say about where to read: u (B, H, T, D) and b (B, H, T)."""

    key: Tensor
    present: Tensor

    def part(self, of: slice) -> Asked:
        return Asked(self.key[:, :, of], self.present[:, :, of])


def empty_cache(initial: Weights, batch: int, keep: int) -> Cache:
    """That of a stream that has seen nothing. `initial` is W_init (H, rows, columns) per layer."""
    H, _, D = initial[-1].shape
    wide = torch.promote_types(initial[-1].dtype, torch.float32)

    def zeros(*shape: int) -> Tensor:
        return initial[-1].detach().new_zeros(batch, *shape, dtype=wide)

    change = tuple(zeros(keep, *w.shape) for w in initial)
    return Cache(Snapshot(change, zeros(keep, H, D), zeros(keep, H).bool()), 0, zeros(H, D), zeros(H), 0)


def fit_cache(cache: Cache, initial: Weights, keep: int, shard: int, like: Tensor) -> Cache:
    """In the precision of these tokens (B, H, T, D). ValueError for one of another memory or batch."""
    if len(cache.snapshots.change) != len(initial):
        raise ValueError(
            f"the kept states have {len(cache.snapshots.change)} fast matrices, the network {len(initial)}; start from "
            "initial_state of this model"
        )
    wide, (B, H, _, D) = torch.promote_types(like.dtype, torch.float32), like.shape
    if not (0 <= cache.used <= keep and 0 <= cache.seen < shard):
        raise ValueError(
            f"the state keeps {cache.used} earlier states and is at token {cache.seen} of a shard, this model keeps "
            f"{keep} and has shards of {shard}; prefill again"
        )
    rows, kept = {"batch": B}, {"batch": B, "kept states": keep}
    names = ("heads", "features or hidden", "outputs")
    change = tuple(
        fit("kept states", x, kept | dict(zip(names, w.shape, strict=True)), like, wide)
        for x, w in zip(cache.snapshots.change, initial, strict=True)
    )
    snapshots = Snapshot(
        change,
        fit("keys of kept states", cache.snapshots.key, kept | {"heads": H, "channels": D}, like, wide),
        fit("kept states in use", cache.snapshots.alive, kept | {"heads": H}, like, torch.bool),
    )
    key_sum = fit("sum of keys of a shard", cache.key_sum, rows | {"heads": H, "channels": D}, like, wide)
    written = fit("tokens of a shard", cache.written, rows | {"heads": H}, like, wide)
    return cache._replace(snapshots=snapshots, key_sum=key_sum, written=written)


def scan(
    form: Form, rule: Rule, shard: int, state: MemoryState, cache: Cache, initial: Weights, q_BHTD: Tensor,
    phi_q_BHTF: Tensor, tokens: Tokens, asked: Asked, write: bool = True,
) -> tuple[Tensor, MemoryState, Cache]:  # fmt: skip
    """As `form`, which is `chunked.scan`, shard by shard, with what is read from the shards before."""
    keep, there = cache.snapshots.key.size(1), _apart(cache)
    key_sum, count, seen, outputs, start = cache.key_sum, cache.written, cache.seen, [], 0
    changed = False
    while start < q_BHTD.size(2):
        part = slice(start, start + shard - seen)  # to the shard's end
        q, phi_q = q_BHTD[:, :, part], phi_q_BHTF[:, :, part]
        here = map_tokens(lambda x, part=part: x[:, :, part], tokens)
        y, state = form(rule, state, initial, q, phi_q, here)
        outputs.append(read(rule, initial, there, y, q, phi_q, asked.part(part), here.restart))
        if here.restart is not None:
            again = here.restart.any(-1)
            there = [kept._replace(alive=kept.alive & ~again) for kept in there]
            changed = True
        if write:
            key_sum, count = _counted(key_sum, count, here)
        start, seen = start + y.size(2), seen + y.size(2)
        if seen == shard:
            seen = 0
            if write:
                alive = torch.ones_like(count, dtype=torch.bool)
                there = [*there, Snapshot(state.change, key_sum / count.clamp_min(1).unsqueeze(-1), alive)][-keep:]
                key_sum, count, changed = torch.zeros_like(key_sum), torch.zeros_like(count), True
    snapshots = _together(cache, there) if changed else cache.snapshots
    return torch.cat(outputs, dim=2), state, Cache(snapshots, len(there), key_sum, count, seen)


def read(
    rule: Rule, initial: Weights, there: list[Snapshot], y_BHTD: Tensor, q_BHTD: Tensor, phi_q_BHTF: Tensor,
    asked: Asked, restart_BHT: Tensor | None,
) -> Tensor:  # fmt: skip
    """`y_BHTD`, what the memory answers now, weighed against what it would have answered at the end of each shard."""
    before = None if restart_BHT is None else restart_BHT.cumsum(-1) == 0
    answers, logits = [y_BHTD], [asked.present]
    for kept in there:
        alive = kept.alive.unsqueeze(-1) if before is None else kept.alive.unsqueeze(-1) & before
        weights = [w0 + w for w0, w in zip(initial, kept.change, strict=True)]

        def product(layer: int, x: Tensor, weights: list[Tensor] = weights) -> Tensor:
            return x @ weights[layer].to(x.dtype)

        answer = net.read(rule.network, product, q_BHTD, phi_q_BHTF)
        answers.append(answer.to(y_BHTD.dtype).masked_fill(~alive.unsqueeze(-1), 0.0))
        with without_autocast(y_BHTD):
            logit = (asked.key @ kept.key.unsqueeze(-1)).squeeze(-1)
        logits.append(logit.masked_fill(~alive, -torch.inf))
    shares = torch.stack(logits).softmax(0).to(y_BHTD.dtype).unsqueeze(-1)
    return (shares * torch.stack(answers)).sum(0)


def _counted(key_sum: Tensor, count: Tensor, here: Tokens) -> tuple[Tensor, Tensor]:
    """The sums after these tokens: of those since the last restart."""
    k = here.k.to(key_sum.dtype)
    if here.restart is None:
        return key_sum + k.sum(2), count + k.size(2)
    after = here.restart.flip(-1).cumsum(-1).flip(-1) - here.restart.long() == 0  # no restart comes later
    again = here.restart.any(-1)
    key_sum, count = key_sum.masked_fill(again.unsqueeze(-1), 0.0), count.masked_fill(again, 0.0)
    return key_sum + k.masked_fill(~after.unsqueeze(-1), 0.0).sum(2), count + after.sum(-1)


def _apart(cache: Cache) -> list[Snapshot]:
    """Those that are there, one by one."""
    kept, keep = cache.snapshots, cache.snapshots.key.size(1)
    return [
        Snapshot(tuple(w[:, i] for w in kept.change), kept.key[:, i], kept.alive[:, i])
        for i in range(keep - cache.used, keep)
    ]


def _together(cache: Cache, there: list[Snapshot]) -> Snapshot:
    """Stacked, after as many empty slots as there are."""
    missing = cache.snapshots.key.size(1) - len(there)

    def stacked(old: Tensor, parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.zeros_like(old[:, :missing]), *(x.unsqueeze(1) for x in parts)], dim=1)

    change = tuple(stacked(old, [kept.change[l] for kept in there]) for l, old in enumerate(cache.snapshots.change))
    return Snapshot(
        change,
        stacked(cache.snapshots.key, [kept.key for kept in there]),
        stacked(cache.snapshots.alive, [kept.alive for kept in there]),
    )
