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
        """The next N tokens, and the hidden states that they were predicted from. Which loop each of them ends."""
        found = Loops([], [], [])
        periods = np.arange(1, self.longest + 1)
        for token in tokens:
            same = self._tokens[::-1] == token  # [p − 1]: the token p earlier
            self._runs = np.where(same, self._runs + 1, 0)
            self._tokens = np.append(self._tokens[1:], token)
            # a run of r tokens at lag p is a text of r + p tokens with period p
            enough = (self._runs >= (TIMES - 1) * periods) & (self._runs + periods >= FEWEST)
            period = int(periods[enough][0]) if enough.any() else 0
            found.period.append(period)
            found.tokens.append(int(self._runs[period - 1]) + period if period else 0)
        found.cosine.extend(self._cosines(found.period, hidden_NM))
        return found

    def _cosines(self, periods: list[int], hidden_NM: Tensor | None) -> list[float | None]:
        """At the lag of each token's period."""
        if hidden_NM is None:
            self._hidden = None
            return [None] * len(periods)
        rows = hidden_NM.float() if self._hidden is None else torch.cat([self._hidden, hidden_NM.float()])
        first = rows.size(0) - len(periods)
        found: list[float | None] = []
        for i, period in enumerate(periods):
            end = first + i + 1
            if not period or end < 2 * period:
                found.append(None)
                continue
            now, before = rows[end - period : end], rows[end - 2 * period : end - period]
            found.append(float(nnf.cosine_similarity(now, before, dim=-1).mean()))
        self._hidden = rows[-2 * self.longest :].clone()
        return found
