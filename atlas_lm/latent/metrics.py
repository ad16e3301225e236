"""What a predicted vector is worth: cosine, retrieval among the frames of its own document, and signs of collapse.

Cosine and retrieval rank models in opposite orders: the mean of what may come has a high cosine and finds nothing. So
both are measured. Sources: contrastive accuracy, LCM (arXiv 2412.08821); effective rank, RankMe (arXiv 2210.02885).
"""

# P predictions of one document, F its frames, C frames of a context, D dimensions, K offsets, N vectors

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

RECALLS = (1, 5, 10)


class Found(NamedTuple):
    """Retrieval of the frame after each context of a document, (P,) each."""

    rank: Tensor  # of the target, from 1; candidates as near as it count a half
    candidates: int


def unit(x: Tensor) -> Tensor:
    """Of length 1 along the last axis; zeros stay."""
    return nnf.normalize(x, dim=-1)


def centred(x: Tensor, centre: Tensor) -> Tensor:
    """Directions from a centre: what all frames have in common distinguishes none of them."""
    return unit(x - centre)


def offset_cosines(y_PD: Tensor, frames_FD: Tensor, offsets: Sequence[int], context: int) -> Tensor:
    """Cosines (P, K) of each prediction with the frame at each offset; NaN where the document has none.

    Prediction p is of frame context + p, which is offset +1; offset 0 is the last frame that it has seen.
    """
    last = torch.arange(len(y_PD)) + context - 1
    at = last[:, None] + torch.tensor(list(offsets))
    there = (at >= 0) & (at < len(frames_FD))
    cosines = torch.einsum("pd,pkd->pk", y_PD, frames_FD[at.clamp(0, len(frames_FD) - 1)])
    return cosines.masked_fill(~there, math.nan)


def retrieve(y_PD: Tensor, frames_FD: Tensor, context: int) -> Found:
    """Rank of each target among all frames of its document but those of the prediction's own context.

    So the candidates, F − C of them, are hard: they are of the same text, and the nearest follow the target.
    """
    P, F = len(y_PD), len(frames_FD)
    scores = y_PD @ frames_FD.T
    column, row = torch.arange(F), torch.arange(P)[:, None]
    seen = (column >= row) & (column < row + context)
    target = scores.gather(1, row + context)
    others = ~seen & (column != row + context)
    nearer = (others & (scores > target)).sum(1)
    alike = (others & (scores == target)).sum(1)
    return Found(1 + nearer + alike / 2, F - context)


def contrastive_accuracy(found: Found) -> Tensor:
    """(P,): the share of the other candidates that lie farther from the prediction than the target; chance 1/2."""
    if found.candidates < 2:
        return torch.full_like(found.rank, math.nan)
    return 1 - (found.rank - 1) / (found.candidates - 1)


def recall(found: Found, k: int) -> Tensor:
    """(P,): 1 where the target is among the nearest k."""
    return (found.rank <= k).to(found.rank.dtype)


def chance(candidates: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """What guessing scores, over documents with so many candidates and predictions each."""
    total = sum(predictions)

    def mean(values: Sequence[float]) -> float:
        return sum(v * n for v, n in zip(values, predictions, strict=True)) / total

    found = {f"recall_at_{k}": mean([min(k, c) / c for c in candidates]) for k in RECALLS}
    found["mrr"] = mean([sum(1 / r for r in range(1, c + 1)) / c for c in candidates])
    return {**found, "contrastive_accuracy": 0.5}


def effective_rank(x_ND: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values, each over their sum; from 1 to D."""
    squares = torch.linalg.eigvalsh(x_ND.double().T @ x_ND.double()).clamp_min(0)
    values = squares.sqrt()
    shares = values / values.sum()
    shares = shares[shares > 1e-7]
    return float((-(shares * shares.log()).sum()).exp())


def spread(x_ND: Tensor, like_ND: Tensor) -> float:
    """Variance per dimension, as a share of what other vectors have: 0 is a collapse to one point."""
    return float(x_ND.double().var(0).mean() / like_ND.double().var(0).mean())
