"""The measures, against what they are by hand."""

import math

import pytest
import torch

from atlas_lm.latent.metrics import (
    centred,
    chance,
    contrastive_accuracy,
    effective_rank,
    offset_cosines,
    recall,
    retrieve,
    spread,
)

EYE = torch.eye(8)


def test_frames_of_the_context_are_no_candidates() -> None:
    """A copy of the last frame: with it among the candidates the target would come second at best."""
    frames = torch.cat([EYE, EYE[:1]])
    found = retrieve(EYE[4:8], frames, 5)  # predictions of frames 5..8: each is the last frame of its context
    assert found.candidates == 4
    assert found.rank.tolist() == [2.5] * 4  # all four candidates are equally near: half of three before the target


def test_ranks_count_those_that_are_nearer() -> None:
    frames = torch.nn.functional.normalize(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = retrieve(y, frames, 3)
    for p in range(9):
        candidates = [j for j in range(12) if not p <= j < p + 3]
        order = sorted(candidates, key=lambda j: -float(y[p] @ frames[j]))
        assert found.rank[p] == 1 + order.index(p + 3)
        assert contrastive_accuracy(found)[p] == pytest.approx(1 - order.index(p + 3) / 8)
    assert recall(found, 12).tolist() == [1.0] * 9


def test_a_constant_prediction_has_the_accuracy_of_chance_where_all_candidates_are_alike() -> None:
    found = retrieve(torch.zeros(7, 8), EYE.repeat(2, 1)[:12], 5)
    assert contrastive_accuracy(found).mean() == pytest.approx(0.5)


def test_chance_is_that_of_the_candidates() -> None:
    found = chance([6, 100], [1, 3])
    assert found["recall_at_5"] == pytest.approx((5 / 6 + 3 * 0.05) / 4)
    assert chance([6], [1])["recall_at_5"] == pytest.approx(5 / 6), "upstream's bank of six"
    assert chance([2], [1])["mrr"] == pytest.approx(0.75)


def test_offsets_beyond_the_document_are_not_there() -> None:
    found = offset_cosines(EYE[5:8], EYE, [0, 1, 2, -5], 5)
    assert found[:, 1].tolist() == [1, 1, 1]
    assert found[:, 0].tolist() == [0, 0, 0]
    assert math.isnan(found[2, 2])
    assert math.isnan(found[0, 3])
    assert not math.isnan(found[1, 3])


def test_effective_rank_is_the_number_of_equal_directions() -> None:
    assert effective_rank(EYE[:4].repeat(5, 1)) == pytest.approx(4)
    assert effective_rank(EYE[:1].repeat(9, 1)) == pytest.approx(1)


def test_spread_is_nothing_where_all_is_one_point() -> None:
    assert spread(EYE[:1].repeat(8, 1), EYE) == 0
    assert spread(EYE, EYE) == 1


def test_centring_a_constant_leaves_nothing() -> None:
    assert not centred(EYE[:1], EYE[0]).any()
