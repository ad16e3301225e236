"""Means with intervals that resample whole sequences, whose tokens are not independent."""

# N sequences, T tokens

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
TAIL = 0.025  # on each side: intervals of 95 %


class Interval(NamedTuple):
    """A mean and where 95 % of its resamples lie."""

    mean: float
    low: float
    high: float


def interval(values_NT: Tensor, seed: int = 0) -> Interval:
    """Of all values that are not NaN, (N, T) or (N,); NaN where there is none."""
    values = values_NT.double().cpu().reshape(len(values_NT), -1)
    there = ~values.isnan()
    sums, counts = torch.where(there, values, 0.0).sum(1), there.sum(1).double()
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        return Interval(math.nan, math.nan, math.nan)
    drawn = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=torch.Generator().manual_seed(seed))
    samples = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = samples.quantile(torch.tensor([TAIL, 1 - TAIL], dtype=torch.double)).tolist()
    return Interval(float(sums.sum() / counts.sum()), low, high)
