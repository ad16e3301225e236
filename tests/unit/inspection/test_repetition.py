"""Loops of every period are found, and texts without a loop are not."""

import numpy as np
import pytest
import torch

from atlas_lm.inspection.repetition import LONGEST, Repetition


def watched(tokens, hidden=None, at_once=5):
    found = []
    repetition = Repetition()
    for first in range(0, len(tokens), at_once):
        some = slice(first, first + at_once)
        loops = repetition.update(tokens[some], None if hidden is None else hidden[some])
        found += list(zip(*loops, strict=True))
    return found


def a_text(n, seed=0):
    return np.random.default_rng(seed).integers(0, 50, n).tolist()


@pytest.mark.parametrize("period", [*range(1, 13), 40, LONGEST])
def test_a_loop_is_found_once_it_has_been_written_three_times(period):
    before, loop = a_text(200), list(range(100, 100 + period))
    found = watched(before + loop * 6)
    enough = max(3 * period, 5)
    periods = [p for p, _, _ in found]
    assert not any(periods[: len(before) + enough - 1])
    assert periods[len(before) + enough - 1 :] == [period] * (6 * period - enough + 1)
    assert found[-1][1] == 6 * period


def test_a_loop_that_was_written_twice_or_that_ended_is_none():
    before, loop = a_text(100), [100, 101, 102, 103]
    assert not any(period for period, _, _ in watched(before + loop * 2 + a_text(50, 1)))
    after = watched(before + loop * 5 + a_text(50, 1))
    assert not any(period for period, _, _ in after[-45:])


def test_a_period_longer_than_the_longest_is_not_watched():
    loop = list(range(100, 100 + LONGEST + 1))
    assert not any(period for period, _, _ in watched(loop * 4))


def test_the_cosine_is_taken_at_the_lag_of_the_period():
    states = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    noise = 0.01 * torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    hidden = states.repeat(6, 1) + noise
    found = watched(list(range(5)) * 6, hidden, at_once=4)
    period, _, cosine = found[-1]
    slow = [float((hidden[t] @ hidden[t - 5]) / (hidden[t].norm() * hidden[t - 5].norm())) for t in range(25, 30)]
    assert period == 5
    assert cosine == pytest.approx(sum(slow) / 5, abs=1e-6)
    assert cosine > 0.99
    consecutive = torch.nn.functional.cosine_similarity(hidden[-5:], hidden[-6:-1], dim=-1)
    assert float(consecutive.max()) < 0.9  # what a watch on period 1 would have seen


def test_what_is_kept_does_not_grow():
    repetition = Repetition()
    for _ in range(100):
        repetition.update(a_text(16), torch.randn(16, 8))
    assert repetition._hidden.shape == (2 * LONGEST, 8)
    assert repetition._tokens.shape == (LONGEST,)
