"""Intervals of shares, and by resampling."""

import math

import pytest
import torch

from atlas_lm.evaluation.bootstrap import interval, share


def test_a_share_has_a_width_where_all_or_none_succeed() -> None:
    assert share(torch.zeros(64, dtype=torch.bool)) == (0.0, 0.0, pytest.approx(0.0566, abs=1e-3))
    assert share(torch.ones(64, dtype=torch.bool)) == (1.0, pytest.approx(0.9434, abs=1e-3), pytest.approx(1.0))
    mean, low, high = share(torch.tensor([True] * 8 + [False] * 2))
    assert (mean, low, high) == (pytest.approx(0.8), pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))


def test_a_single_sequence_has_a_mean_and_no_interval() -> None:
    mean, low, high = interval(torch.arange(4.0)[None])
    assert mean == 1.5
    assert math.isnan(low)
    assert math.isnan(high)
    two = interval(torch.tensor([[1.0, 2.0], [3.0, math.nan]]))
    assert two == (2.0, 1.5, 3.0)
