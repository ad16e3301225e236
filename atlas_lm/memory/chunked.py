"""The memory a chunk at a time: training, prefill and decode all run through `scan` (M7).

Inside a chunk every gradient is taken at W_ξ, so that all gates fold into one lower-triangular coefficient matrix and a
read is attention-like; per-token weights are never materialised:

    x W_t = x W_init + a_t x (W_ξ − W_init) − b_t x S_ξ − Σ_{i≤t} Γ[t,i] / D[t,i] (x·x_i) e_i
    (layer by layer, e_i the layer's error; Γ, a_t and b_t: `coefficients.py`)

The definitions of D, of the intake (1 − θ) and of everything else are those of `reference.py`.
"""

# B batch, H heads, T tokens, D head dim, F feature dim, C chunk, N = C + halo tokens of a block, K chunks

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory import coefficients as fold
from atlas_lm.memory import delta
from atlas_lm.memory.coefficients import Steps
from atlas_lm.memory.host_reads import may_look
from atlas_lm.memory.loop import autograd as loop
from atlas_lm.memory.network import Weights, renormalised
from atlas_lm.memory.state import (
    MemoryState,
    Rule,
    Tokens,
    all_finite,
    append,
    fit_state,
    initial_state,
    make_tail,
    map_tokens,
    without_autocast,
    without_momentum,
)


def scan(
    rule: Rule, state: MemoryState, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens
) -> tuple[Tensor, MemoryState]:
    """Read with every query while learning every token: (B, H, T, D) outputs and the state after the last token.

    `initial` is W_init (H, rows, columns) per layer. The calls may cut the tokens anywhere:
    outputs and state are those of one long call. ValueError for a state of another memory or batch.
    """
    state = fit_state(rule, state, initial, tokens)
    if rule.update == "delta":
        return _delta(rule, state, initial, q_BHTD, phi_q_BHTF, tokens)
    if rule.weight_norm:
        return _chunk_by_chunk(rule, state, initial, q_BHTD, phi_q_BHTF, tokens)
    row = append(rule, state, without_momentum(rule, tokens))
    length = row.k.size(2) - rule.halo
    filled = length % rule.chunk
    tail = make_tail(rule, row, filled)
    complete = length // rule.chunk
    momentum = state.momentum if rule.has_momentum else tuple(map(torch.zeros_like, state.change))
    before = [torch.cat(halves, dim=-2).flatten(0, 1) for halves in zip(state.change, momentum, strict=True)]
    y_BHTD, after = _run(rule, before, initial, q_BHTD, phi_q_BHTF, row, state.filled, complete)
    halves = (z.unflatten(0, q_BHTD.shape[:2]).chunk(2, dim=-2) for z in after)
    change, momentum = zip(*halves, strict=True)
    return y_BHTD, MemoryState(change, momentum if rule.has_momentum else (), tail, filled, rule)


def scan_shard(rule: Rule, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens) -> Tensor:
    """The outputs of `scan` from an empty memory. What no read of these tokens sees is not computed."""
    if rule.update == "delta" or rule.weight_norm:
        empty = initial_state(rule, initial, q_BHTD.size(0), phi_q_BHTF.size(-1), tokens.restart is not None)
        return scan(rule, empty, initial, q_BHTD, phi_q_BHTF, tokens)[0]
    row = without_momentum(rule, tokens)
    if rule.halo:
        row = map_tokens(lambda x: nnf.pad(x, (0, 0, rule.halo, 0) if x.dim() == 4 else (rule.halo, 0)), row)
    last = -(-q_BHTD.size(2) // rule.chunk) - 1
    return _run(rule, None, initial, q_BHTD, phi_q_BHTF, row, 0, last)[0]


def _chunk_by_chunk(
    rule: Rule, state: MemoryState, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens
) -> tuple[Tensor, MemoryState]:
    """`scan` of a rule with a weight norm, which acts between chunks. Meant for long ones, of which there are few."""
    plain = rule._replace(weight_norm=False)
    state, start, outputs = state._replace(rule=plain), 0, []
    while start < q_BHTD.size(2):
        part = slice(start, start + rule.chunk - state.filled)  # to the chunk's end
        of_chunk = map_tokens(lambda x, part=part: x[:, :, part], tokens)
        y, state = scan(plain, state, initial, q_BHTD[:, :, part], phi_q_BHTF[:, :, part], of_chunk)
        outputs.append(y)
        start += y.size(2)
        if state.filled == 0:
            state = state._replace(change=renormalised(rule.network, initial, state.change))
    return torch.cat(outputs, dim=2), state._replace(rule=rule)


Outcome = tuple[Tensor, list[Tensor]]  # outputs (B, H, T, D), and fast matrices (B·H, rows, columns)


def _isolated(compute: Callable[[Tokens], Outcome], row: Tokens, before: int, q_BHTD: Tensor) -> Outcome:
    """`compute` of a row with `before` tokens of earlier calls; none that is not finite reaches an earlier token.

    On a CPU a look at the outputs says whether there is one. On a GPU a look would wait: there such tokens are always
    left out, and what comes after them is made NaN, with the state.
    """
    looks = may_look(q_BHTD)
    if looks or q_BHTD.is_meta or q_BHTD.size(2) == 1:
        y_BHTD, after = compute(row)
        if all_finite(y_BHTD):
            return y_BHTD, after
    parts = (row.k, row.phi, row.v, torch.stack(row.gates, -1))
    bad_BHN = ~torch.stack([torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1) for x in parts]).isfinite().all(0)
    clean = map_tokens(lambda x: x.masked_fill(bad_BHN.unsqueeze(-1) if x.dim() == 4 else bad_BHN, 0), row)
    clean = clean._replace(restart=row.restart)
    early_BHT = (bad_BHN.cumsum(-1) == 0)[:, :, before:].unsqueeze(-1)
    without, states = compute(clean)
    if looks:
        return torch.where(early_BHT, without, y_BHTD), after
    poison = torch.where(bad_BHN.any(-1).flatten(), torch.nan, 0.0)[:, None, None]
    return torch.where(early_BHT, without, torch.nan), [z + poison.to(z.dtype) for z in states]


def _delta(
    rule: Rule, state: MemoryState, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens
) -> tuple[Tensor, MemoryState]:
    """`delta.scan`, where a token that is not finite reaches no earlier one."""

    def compute(row: Tokens) -> Outcome:
        y_BHTD, after = delta.scan(rule, state, initial, q_BHTD, phi_q_BHTF, row)
        return y_BHTD, [after.change[0].flatten(0, 1)]

    y_BHTD, (change,) = _isolated(compute, tokens, 0, q_BHTD)
    return y_BHTD, state._replace(change=(change.unflatten(0, q_BHTD.shape[:2]),))


def _run(
    rule: Rule, before: list[Tensor] | None, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, row: Tokens,
    filled: int, complete: int,
) -> Outcome:  # fmt: skip
    """`_run_all`, where a token that is not finite reaches no earlier token of its row."""

    def compute(row: Tokens) -> Outcome:
        return _run_all(rule, before, initial, q_BHTD, phi_q_BHTF, row, filled, complete)

    return _isolated(compute, row, rule.halo + filled, q_BHTD)


def _run_all(
    rule: Rule, before: list[Tensor] | None, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, row: Tokens,
    filled: int, complete: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Of a row that begins with the halo and `filled` tokens of before: the outputs of the new ones, and the states
    after `complete` chunks (none where `before` is None, an empty memory)."""
    length = row.k.size(2) - rule.halo
    count = -(-length // rule.chunk)
    if length < rule.chunk:  # decoding: no more than the tokens that are there
        rule = rule._replace(chunk=length)
    blocks = _blocks(rule, row, count)
    phi_q_BHKCF = _queries(rule, phi_q_BHTF, filled, count)
    keeps = fold.segments(rule, blocks)
    with without_autocast(q_BHTD):  # products of gates stay wide
        steps = fold.steps(rule, blocks, keeps)
        gates = fold.decays(rule, blocks, keeps)
    token = rule.read == "token" and rule.update == "gradient"
    residual = rule.network.residual
    low, wide = _precisions(blocks.k)

    def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.flatten(0, 1).to(dtype)

    each = fold.Decays(*(flat(gate, wide) if token else None for gate in gates))  # type: ignore[arg-type]
    chunks = loop.ChunkBatch(
        phi=flat(blocks.phi, low),
        v=flat(blocks.v - blocks.k if residual else blocks.v, low),
        phi_q=flat(phi_q_BHKCF, low),
        gamma=flat(blocks.gates.gamma, wide),
        same_segment=None if keeps is None else flat(keeps.same_segment, torch.bool),
        in_start_segment=None if keeps is None else flat(keeps.in_start_segment, torch.bool),
        decay=flat(_decay(rule, steps), wide),
        eta=flat(steps.eta, wide),
        write_coef=flat(_write_coef(rule, steps), wide),
        token_eta=each.eta,
        intake=each.intake,
        retain=each.retain,
        carry=each.carry,
    )
    config = loop.LoopConfig(
        rule.network, rule.context, rule.update, rule.newton_schulz_steps, rule.radius, low,
        complete=complete, train=torch.is_grad_enabled(),
    )  # fmt: skip
    y_GTD, after = loop.run(config, before, initial, chunks)
    y_BHTD = y_GTD.unflatten(0, q_BHTD.shape[:2])[:, :, filled:length]
    return y_BHTD + q_BHTD if residual else y_BHTD, after


def _decay(rule: Rule, steps: Steps) -> Tensor:
    """How W − W_init and S of a chunk's end depend on those of its start: (B, H, K, 2, 2)."""
    zero = torch.zeros_like(steps.carry)
    momentum = zero if rule.update == "newton_schulz" else -steps.momentum
    return torch.stack([steps.weights, momentum, zero, steps.carry], dim=-1).unflatten(-1, (2, 2))


def _write_coef(rule: Rule, steps: Steps) -> Tensor:
    """How they depend on each token's gradient: (B, H, K, 2, N)."""
    write_coef = steps.write_weights
    return torch.stack(
        [torch.zeros_like(write_coef) if rule.update == "newton_schulz" else -write_coef, steps.write_momentum], dim=-2
    )


def _precisions(like: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the operands of matrix products, and of everything else: autocast narrows the first alone."""
    device, wide = like.device.type, torch.promote_types(like.dtype, torch.float32)
    if like.is_meta:
        return wide, wide
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide, wide


def _blocks(rule: Rule, row: Tokens, count: int) -> Tokens:
    """Cut a row into chunks with their halos: (B, H, K, N, …). Zeros after the end learn nothing."""
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
    padding = count * rule.chunk - filled - x_BHTD.size(2)
    if filled or padding:  # a pad of nothing is a copy
        x_BHTD = nnf.pad(x_BHTD, (0, 0, filled, padding))
    return x_BHTD.unflatten(2, (count, rule.chunk))
