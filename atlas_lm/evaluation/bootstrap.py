"""Means with intervals that resample whole sequences, whose tokens are not independent; shares by Wilson's."""

# N sequences, T tokens

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
Z = 1.959964  # of the normal distribution, at 95 %
TAIL = 0.025  # on each side: intervals of 95 %


class Interval(NamedTuple):
    """A mean and its interval of 95 %."""

    mean: float
    low: float
    high: float


def interval(values_NT: Tensor, seed: int = 0) -> Interval:
    """Of all values that are not NaN, (N, T) or (N,); NaN where there is none, and no bounds from a single sequence,
    which says nothing of how far others differ."""
    values = values_NT.double().cpu().reshape(len(values_NT), -1)
    there = ~values.isnan()
    sums, counts = torch.where(there, values, 0.0).sum(1), there.sum(1).double()
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        return Interval(math.nan, math.nan, math.nan)
    if len(counts) == 1:
        return Interval(float(sums / counts), math.nan, math.nan)
    drawn = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=torch.Generator().manual_seed(seed))
    samples = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = samples.quantile(torch.tensor([TAIL, 1 - TAIL], dtype=torch.double)).tolist()
    return Interval(float(sums.sum() / counts.sum()), low, high)


def share(hits_N: Tensor) -> Interval:
    """Of trials that succeed or not: Wilson's interval, which has a width at 0 and 1 too, where resampling has none."""
    n, p = len(hits_N), hits_N.double().mean().item()
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))
