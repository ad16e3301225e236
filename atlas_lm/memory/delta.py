"""`update: delta`: a linear memory that corrects every token's error at the weights that its predecessors left (M7).

    W_t − W_init = α_t (W_{t−1} − W_init) + η_t γ_t φ_tᵀ (v_t − φ_t W̃_t),   W̃_t = W_init + α_t (W_{t−1} − W_init)
    y_t = φ(q_t) W_t

With features φ of unit norm this is a gated delta rule on φ, which `gated_delta.py` solves exactly a chunk at a time:
a chunk of 64 stores what single tokens store, whatever `local_chunks` say. No momentum, and no bound on W: a write
corrects at most the error that there is.
"""

# B batch, H heads, T tokens, D head dim, F feature dim

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from atlas_lm.memory import gated_delta
from atlas_lm.memory.network import Weights
from atlas_lm.memory.state import MemoryState, Rule, Tokens

Form = Callable[..., tuple[Tensor, Tensor]]  # `gated_delta.scan`, or the same one token at a time


def scan(
    rule: Rule,
    state: MemoryState,
    initial: Weights,
    q_BHTD: Tensor,
    phi_q_BHTF: Tensor,
    tokens: Tokens,
    form: Form = gated_delta.scan,
) -> tuple[Tensor, MemoryState]:
    """As `chunked.scan`, of a state that fits."""
    alpha, eta, _, gamma = tokens.gates
    if tokens.restart is not None:
        alpha = alpha.masked_fill(tokens.restart, 0.0)
    wanted = tokens.v - tokens.k if rule.network.residual else tokens.v
    y, change = form(phi_q_BHTF, tokens.phi, wanted, alpha, eta * gamma, state.change[0], initial_HDE=initial[0])
    if rule.network.residual:
        y = y + q_BHTD
    return y, state._replace(change=(change,))
