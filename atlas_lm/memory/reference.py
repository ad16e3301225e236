"""The memory one token at a time: slow and obvious, the truth that the fast form is tested against.

    g_t = Σ_{i = t−c+1..t} γ_i ∇ℓ(W_ξ; k_i, v_i) / D_i                 ATLAS eq 9 (the Omega rule), M4, M16
    S_t = θ_t S_{t−1} + (1 − θ_t) g_t                                  ATLAS eq 33, M5
    W_t − W_init = α_t (W_{t−1} − W_init) − η_t U(S_t)                 ATLAS eq 32
    y_t = M(W_t; q_t)

W_ξ are the weights at the start of the token's chunk. D_i, the curvature that token i shares with the tokens of the
chunk up to t, makes every write a share of the error (η ≤ 1: no overshoot): D_i = c (κ_ii + Σ_{j≠i} γ_j κ_ij), so that
D⁻¹ κ diag(γ) has row sums ≤ 1/c (Gershgorin). It grows with t, and applies to the whole partial sum: at every t the
memory is what it would be if the chunk ended there. With (1 − θ) at the intake S is an average of gradients, bounded
whatever θ does; with a constant θ that equals a factor (1 − θ) on η.

Forgetting leads back to W_init, not to zero: a two-layer network at zero has no gradient and never learns again.

Without momentum (`Rule.momentum`) θ is 0, and S_t = g_t is not carried.

For U = Newton–Schulz (M7) D is left out (U has a fixed size) and one update is made at the chunk's end, of

    S = θ̄ S_ξ + (1 − θ̄) Σ_t g_t,   W − W_init = Π α (W_ξ − W_init) − η̄ U(S)

with the chunk's mean θ̄ and η̄: momentum acts from chunk to chunk. Reads use W_ξ.

With a weight norm (LaCT) the weights of a chunk's end become W_:j ‖W_init,:j‖ / ‖W_:j‖, column by column.
"""

# B batch, H heads, T tokens, D head dim, F feature dim, N tokens of halo and chunk so far

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory import delta
from atlas_lm.memory import network as net
from atlas_lm.memory.cache import Asked
from atlas_lm.memory.network import Weights
from atlas_lm.memory.newton_schulz import newton_schulz
from atlas_lm.memory.projection import ProjectionState
from atlas_lm.memory.state import (
    MemoryState,
    Rule,
    Tokens,
    append,
    bounded,
    fit_state,
    initial_state,
    make_tail,
    map_tokens,
    without_momentum,
)


def scan(
    rule: Rule, state: MemoryState, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens
) -> tuple[Tensor, MemoryState]:
    """Read with every query while learning every token: (B, H, T, D) outputs and the state after the last token.

    `initial` is W_init (H, rows, columns) per layer. Same signature as `chunked.scan`, but a restart must fall on the
    same tokens in the whole batch, and the state must not hold a chunk that a restart has cut.
    """
    state = fit_state(rule, state, initial, tokens)
    if rule.update == "delta":
        return delta.scan(rule, state, initial, q_BHTD, phi_q_BHTF, tokens, gated_delta)
    row = append(rule, state, without_momentum(rule, tokens))
    nothing = tuple(map(torch.zeros_like, state.change))
    change, momentum = state.change, state.momentum if rule.has_momentum else nothing
    restarts = [] if row.restart is None else row.restart[0, 0].nonzero().flatten().tolist()
    floor = max((t for t in restarts if t < rule.halo), default=0)  # windows reach back to the last restart at most
    chunk = _Chunk(rule, change, momentum, initial, row, floor, start=rule.halo)
    outputs = []
    for t in range(rule.halo, row.k.size(2)):
        if t in restarts:
            floor = t
            change = momentum = tuple(torch.zeros_like(w) for w in change)
            chunk = _Chunk(rule, change, momentum, initial, row, floor, start=t)
        chunk.learn(t)
        new = t - rule.halo - state.filled
        if new >= 0:
            y = chunk.read(q_BHTD[:, :, new : new + 1], phi_q_BHTF[:, :, new : new + 1])
            outputs.append(y)
        if (t - rule.halo + 1) % rule.chunk == 0:
            change, momentum = chunk.end()
            chunk = _Chunk(rule, change, momentum, initial, row, max(t + 1 - rule.halo, floor), start=t + 1)
    filled = (row.k.size(2) - rule.halo) % rule.chunk
    kept = momentum if rule.has_momentum else ()
    return torch.cat(outputs, dim=2), MemoryState(change, kept, make_tail(rule, row, filled), filled, rule)


def scan_shard(rule: Rule, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens) -> Tensor:
    """The outputs of `scan` from an empty memory."""
    B, F = q_BHTD.size(0), phi_q_BHTF.size(-1)
    state = initial_state(rule, initial, B, F, tokens.restart is not None)
    return scan(rule, state, initial, q_BHTD, phi_q_BHTF, tokens)[0]


def _add(initial: Weights, change: Weights) -> Weights:
    return tuple(w0 + w for w0, w in zip(initial, change, strict=True))


class _Chunk:
    """One chunk in progress."""

    def __init__(
        self, rule: Rule, change: Weights, momentum: Weights, initial: Weights, row: Tokens, first: int, start: int
    ) -> None:
        self.rule, self.change, self.momentum, self.initial, self.row = rule, change, momentum, initial, row
        self.weights = _add(initial, change)  # W_ξ
        self.first = self.t = first  # the first token whose gradient counts: the halo's, or that of a restart
        zero = row.gates.alpha[..., :0]
        self.write_weights, self.write_momentum = zero, zero  # of gradient i in W_t and S_t: (B, H, N)
        self.windows = zero  # in Σ_t g_t
        one = torch.ones_like(row.k[..., 0, 0])
        self.a, self.b, self.carry = (
            one,
            torch.zeros_like(one),
            one,
        )  # W_t − W_init = a (W_ξ − W_init) − b S_ξ − …, S_t = carry S_ξ + …
        self.etas: list[Tensor] = []
        self.thetas: list[Tensor] = []
        # every gradient of the chunk is taken at W_ξ, so it can be computed now; a sum up to t sees those up to t only
        chunk_end = rule.halo + ((start - rule.halo) // rule.chunk + 1) * rule.chunk
        all_of_it = slice(first, min(chunk_end, row.k.size(2)))
        layers = [net.plain_layer(w) for w in self.weights]
        g = net.gradient(rule.network, layers, row.k[:, :, all_of_it], row.phi[:, :, all_of_it], row.v[:, :, all_of_it])
        self.gradients = [x.unsqueeze(-1) * e.unsqueeze(-2) for x, e in zip(g.inputs, g.errors, strict=True)]
        self.kappa = net.curvature(g, g.inputs[0] @ g.inputs[0].mT)

    def learn(self, t: int) -> None:
        """Advance S and W by token t: the coefficient of each gradient instead of the sum, so that D can change."""
        alpha, eta, theta, _ = (gate[..., t, None] for gate in self.row.gates)
        self.t = t
        i = torch.arange(self.first, t + 1, device=self.row.k.device)
        gamma_BHN = self.row.gates.gamma[..., self.first : t + 1]
        grow = t + 1 - self.first - self.write_momentum.size(-1)
        zeros = torch.zeros_like(gamma_BHN[..., :grow])
        window = torch.where(i > t - self.rule.context, gamma_BHN, torch.zeros_like(gamma_BHN))
        self.thetas.append(theta[..., 0])
        self.windows = torch.cat([self.windows, zeros], -1) + window
        self.write_momentum = theta * torch.cat([self.write_momentum, zeros], -1) + (1 - theta) * window
        self.write_weights = alpha * torch.cat([self.write_weights, zeros], -1) + eta * self.write_momentum
        self.carry = theta[..., 0] * self.carry
        self.b = alpha[..., 0] * self.b + eta[..., 0] * self.carry
        self.a = alpha[..., 0] * self.a
        self.etas.append(eta[..., 0])

    def _shared_curvature(self) -> Tensor:
        """D of each token so far (B, H, N)."""
        gamma = self.row.gates.gamma[..., self.first : self.t + 1].detach()
        if self.rule.update == "newton_schulz":
            return torch.ones_like(gamma)
        N = gamma.size(-1)
        kappa = self.kappa[..., :N, :N]
        own = kappa.diagonal(dim1=-2, dim2=-1)
        others = (kappa * gamma.unsqueeze(-2)).sum(-1) - own * gamma
        return (self.rule.context * (own + others)).clamp_min(net.SMALLEST_CURVATURE)

    def _sum(self, coefficients_BHN: Tensor) -> Weights:
        scaled = coefficients_BHN / self._shared_curvature()
        return tuple(torch.einsum("bhn,bhnrc->bhrc", scaled, g[:, :, : scaled.size(-1)]) for g in self.gradients)

    def _kept(self) -> Weights:
        return tuple(self.a[..., None, None] * w for w in self.change)

    def change_now(self) -> Weights:
        b = self.b[..., None, None]
        step = self._sum(self.write_weights)
        return tuple(w - b * s - d for w, s, d in zip(self._kept(), self.momentum, step, strict=True))

    def read(self, q_BH1D: Tensor, phi_q_BH1F: Tensor) -> Tensor:
        at_start = self.rule.read == "chunk" or self.rule.update == "newton_schulz"
        weights = self.weights if at_start else _add(self.initial, self.change_now())
        return net.read(self.rule.network, lambda l, x: x @ weights[l], q_BH1D, phi_q_BH1F)

    def end(self) -> tuple[Weights, Weights]:
        """W − W_init and S at the chunk's end, where the next chunk begins."""
        if self.rule.update == "gradient":
            step = self._sum(self.write_momentum)
            momentum = tuple(self.carry[..., None, None] * s + d for s, d in zip(self.momentum, step, strict=True))
            return bounded(self.rule, self.initial, self.change_now()), momentum
        eta, theta = (torch.stack(gates).mean(0)[..., None, None] for gates in (self.etas, self.thetas))
        step = self._sum(self.windows)
        momentum = tuple(theta * s + (1 - theta) * d for s, d in zip(self.momentum, step, strict=True))
        U = [newton_schulz(s, self.rule.newton_schulz_steps) for s in net.split_matrices(self.rule.network, momentum)]
        write = net.join_matrices(self.rule.network, U)
        change = tuple(w - eta * u for w, u in zip(self._kept(), write, strict=True))
        return bounded(self.rule, self.initial, change), momentum


def project(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    state: ProjectionState,
    persistent: ProjectionState,
    restart_BHT: Tensor | None = None,
) -> tuple[Tensor, ProjectionState]:
    """TNT eq 13–15, one token at a time. Same signature as `projection.project`."""
    M, n = state
    outputs = []
    for t in range(k_BHTD.size(2)):
        if restart_BHT is not None:
            again = restart_BHT[:, :, t]
            M = torch.where(again[..., None, None], persistent.M, M)
            n = torch.where(again, persistent.n, n)
        k, q = k_BHTD[:, :, t], q_BHTD[:, :, t]
        M = M + k.unsqueeze(-1) * k.unsqueeze(-2)
        n = n + k.square().sum(-1)
        y = (M @ q.unsqueeze(-1)).squeeze(-1) / n.unsqueeze(-1)
        outputs.append(nnf.normalize(y, dim=-1))  # zero at a shard's padding, whose queries are zero
    return torch.stack(outputs, dim=2), ProjectionState(M, n)


def cached(
    rule: Rule, shard: int, keep: int, initial: Weights, q_BHTD: Tensor, phi_q_BHTF: Tensor, tokens: Tokens,
    asked: Asked,
) -> Tensor:  # fmt: skip
    """A memory and its states at the ends of the last `keep` shards: the equations of `cache.py`, token by token."""
    state = initial_state(rule, initial, q_BHTD.size(0), phi_q_BHTF.size(-1), tokens.restart is not None)
    kept: list[tuple[list[Tensor], Tensor]] = []  # the weights at a shard's end, and the mean of its keys
    keys: list[Tensor] = []
    outputs = []
    for t in range(q_BHTD.size(2)):
        here = slice(t, t + 1)
        if tokens.restart is not None and tokens.restart[0, 0, t]:
            kept, keys = [], []
        now = map_tokens(lambda x, here=here: x[:, :, here], tokens)
        y, state = scan(rule, state, initial, q_BHTD[:, :, here], phi_q_BHTF[:, :, here], now)
        answers, logits = [y], [asked.present[:, :, here]]
        for weights, key in kept:

            def product(layer: int, x: Tensor, weights: list[Tensor] = weights) -> Tensor:
                return x @ weights[layer]

            answers.append(net.read(rule.network, product, q_BHTD[:, :, here], phi_q_BHTF[:, :, here]))
            logits.append((asked.key[:, :, here] * key.unsqueeze(-2)).sum(-1))
        shares = torch.stack(logits).softmax(0)
        outputs.append(sum(share.unsqueeze(-1) * answer for share, answer in zip(shares, answers, strict=True)))
        keys.append(tokens.k[:, :, t])
        if (t + 1) % shard == 0:
            kept = [*kept, (list(_add(initial, state.change)), torch.stack(keys).mean(0))][-keep:]
            keys = []
    return torch.cat(outputs, dim=2)


def gated_delta(
    q_BGTD: Tensor, k_BGTD: Tensor, v_BHTE: Tensor, alpha_BHT: Tensor, beta_BHT: Tensor, state_BHDE: Tensor,
    initial_HDE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gated delta rule (arXiv 2412.06464 eq 10), one token at a time. As `gated_delta.scan`, without its chunk."""
    S, outputs = state_BHDE, []
    w0 = torch.zeros_like(S[0]) if initial_HDE is None else initial_HDE
    for t in range(v_BHTE.size(2)):
        k, q = k_BGTD[:, :, t].unsqueeze(-1), q_BGTD[:, :, t].unsqueeze(-1)
        S = alpha_BHT[:, :, t, None, None] * S
        error = v_BHTE[:, :, t].unsqueeze(-2) - ((w0 + S) * k).sum(-2, keepdim=True)
        S = S + k * (beta_BHT[:, :, t, None, None] * error)
        outputs.append(((w0 + S) * q).sum(-2))
    return torch.stack(outputs, dim=2), S
