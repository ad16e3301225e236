"""Loops of any period, from tokens and from hidden states at the lag of the period.

A loop of period p is a tail of the text that equals itself p tokens earlier. Consecutive hidden states alike find only
p = 1: SmolLM2's greedy loops of period 5 and 8 have consecutive cosines below 0.92, and above 0.997 at their own lag.
The hidden states are a transient buffer of the last tokens, which nothing else sees.
"""

# N tokens, M model width, P periods

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional as nnf

LONGEST = 64  # period, in tokens
TIMES = 3  # how often a loop must have been written before it counts as one
FEWEST = 5  # tokens that it must be long: three equal dashes are a style


class Loops(NamedTuple):
    """Per token."""

    period: list[int]  # 0: no loop
    tokens: list[int]  # that belong to the loop so far
    cosine: list[float | None]  # the mean over one period of hidden states with those one period earlier


class Repetition:
    """Watches a text as it grows; what it keeps does not grow."""

    def __init__(self, longest: int = LONGEST) -> None:
        self.longest = longest
        self._tokens = np.full(longest, -1, dtype=np.int64)  # the last ones, oldest first
        self._runs = np.zeros(longest, dtype=np.int64)  # per period p: tokens in a row that equal those p earlier
        self._hidden: Tensor | None = None  # (at most 2 · longest, M)

    def update(self, tokens: list[int], hidden_NM: Tensor | None = None) -> Loops:
        """N more tokens, at least one, and the hidden states that they were predicted from. Which loop each ends."""
        P, n = self.longest, len(tokens)
        text = np.concatenate([self._tokens, np.asarray(tokens, dtype=np.int64)])
        # [t, p − 1]: whether token t equals the one p earlier
        same = sliding_window_view(text, P + 1)[:, :-1][:, ::-1] == text[P:, None]
        t = np.arange(n)[:, None]
        broken = np.maximum.accumulate(np.where(same, -1, t), axis=0)  # the last token that did not, −1: none yet
        runs = np.where(broken < 0, self._runs + t + 1, t - broken)
        self._tokens, self._runs = text[-P:], runs[-1]
        periods = np.arange(1, P + 1)
        # a run of r tokens at lag p is a text of r + p tokens with period p
        enough = (runs >= (TIMES - 1) * periods) & (runs + periods >= FEWEST)
        shortest = enough.argmax(1)
        period = np.where(enough.any(1), shortest + 1, 0)
        length = np.where(period > 0, runs[np.arange(n), shortest] + period, 0)
        found = Loops(period.tolist(), length.tolist(), [])
        found.cosine.extend(self._cosines(found.period, hidden_NM))
        return found

    def _cosines(self, periods: list[int], hidden_NM: Tensor | None) -> list[float | None]:
        """At the lag of each token's period."""
        if hidden_NM is None:
            self._hidden = None
            return [None] * len(periods)
        rows = hidden_NM.float() if self._hidden is None else torch.cat([self._hidden, hidden_NM.float()])
        first = rows.size(0) - len(periods)
        found: list[float | None] = [None] * len(periods)
        for period in set(periods) - {0}:
            ends = [(i, first + i + 1) for i, p in enumerate(periods) if p == period and first + i + 1 >= 2 * period]
            if ends:
                alike = nnf.cosine_similarity(rows[period:], rows[:-period], dim=-1).unfold(0, period, 1).mean(-1)
                values = alike.tolist()
                for i, end in ends:
                    found[i] = values[end - 2 * period]
        self._hidden = rows[-2 * self.longest :].clone()
        return found
