"""The weights of our windowed attention, which its kernels never hold, and their sums over a prompt."""

# T tokens, t tokens of a piece, H heads, D head dim, K keys, L layers

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atlas_lm.inspection import metrics
from atlas_lm.inspection.schema import Prompt
from atlas_lm.model.attention import AttentionState, rotate

QUERIES = 256  # whose weights are computed at a time


def window_weights(
    qkv_LTC: Tensor, states: Sequence[AttentionState], heads: int, window: int
) -> list[tuple[Tensor, Tensor, int]]:
    """The attention weights of T tokens that follow the layers' states, in pieces: (L, H, t, K), the keys that each
    sees (t,), and the position of the first key; those that a query does not see weigh 0. `qkv_LTC`: (L, T, 3·H·D)
    after the convolution. All layers at once: their states are of one age.
    """
    state = states[0]
    q, k, _ = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv_LTC.chunk(3, dim=-1))
    q, k = (rotate(x, state.position, state.base) for x in (q, k))
    keys_LHKD = torch.cat([torch.cat([s.k for s in states]).to(k.dtype), k], dim=2)
    valid_K = torch.cat([state.valid, state.valid.new_ones(q.size(2))])
    pieces = []
    for first in range(0, q.size(2), QUERIES):
        part = q[:, :, first : first + QUERIES]
        some = slice(first, first + part.size(2) + window - 1)
        scores = part @ keys_LHKD[:, :, some].mT * part.size(-1) ** -0.5
        ones = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
        may = ones.triu() & ones.tril(window - 1) & valid_K[some]
        weights = scores.masked_fill(~may, -torch.inf).softmax(-1)
        pieces.append((weights, may.sum(-1), state.position - (window - 1) + first))
    return pieces


class PromptSums:
    """Sums over the pieces of a prompt, of all captured layers."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.queries = tokens, 0
        self.entropy = self.concentration = self.seen = torch.zeros(())
        self.mass: Tensor | None = None

    def add(self, weights_LHtK: Tensor, seen_t: Tensor, first: int) -> None:
        """A piece of weights; `first`: the position of its first key."""
        of = metrics.head_metrics(weights_LHtK, seen_t)
        n = weights_LHtK.size(2)
        self.queries += n
        self.entropy = self.entropy + of.entropy_bits.mean(1).sum(-1)
        self.concentration = self.concentration + of.concentration.mean(1).sum(-1)
        self.seen = self.seen + metrics.seen_keys(weights_LHtK) * n
        if self.mass is None:
            self.mass = weights_LHtK.new_zeros(*weights_LHtK.shape[:2], self.tokens)
        inside = slice(max(0, -first), weights_LHtK.size(3))
        mass = weights_LHtK.sum(2)[..., inside][..., : self.tokens - max(0, first)]
        self.mass[..., max(0, first) : max(0, first) + mass.size(-1)] += mass

    def into(self, prompt: Prompt, window: int) -> None:
        """The columns."""
        assert self.mass is not None
        prompt.entropy_mean = (self.entropy / self.queries).tolist()
        prompt.concentration_mean = (self.concentration / self.queries).tolist()
        prompt.seen_keys = (self.seen / self.queries).tolist()
        prompt.basin = metrics.relative_basin(self.mass, window).tolist()
