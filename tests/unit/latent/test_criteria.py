"""What a run has to reach, by epoch and beside the baselines; decided on plain numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_lm.evaluation.bootstrap import interval
from atlas_lm.latent.criteria import judge
from atlas_lm.latent.five_cat import Measured
from atlas_lm.latent.rows import Row, verdict


def epoch(number: int, **values: float) -> dict[str, Any]:
    names = {"cosine": "val/cosine", "train": "train/cosine", "margin": "five_cat_probe/margin_seen",
             "peak": "five_cat_probe/peak_seen", "r5": "val/recall_at_5"}  # fmt: skip
    return {"epoch": number - 1, **{names[name]: value for name, value in values.items()}}


GOOD = [
    epoch(n, cosine=0.5 + 0.01 * n, train=0.6, margin=0.2, peak=1.0, r5=0.96) for n in range(1, 9)
]  # what the seed wants and no run has reached


def test_a_run_as_the_seed_wants_it_passes() -> None:
    for head in ("direct", "residual"):
        assert all(criterion.passed for criterion in judge(GOOD, head))


@pytest.mark.parametrize(
    ("at", "name", "value"), [(3, "cosine", 0.49), (3, "peak", 0.0), (6, "margin", 0.07), (8, "r5", 0.94)]
)
def test_one_value_too_low_fails_its_criterion_alone(at: int, name: str, value: float) -> None:
    rows = [dict(row) for row in GOOD]
    rows[at - 1] |= epoch(at, **{name: value})
    failed = [criterion for criterion in judge(rows, "residual") if not criterion.passed]
    assert [(criterion.epoch, criterion.found) for criterion in failed] == [(at, value)]


def test_what_was_not_logged_fails() -> None:
    assert not all(criterion.passed for criterion in judge(GOOD[:2], "direct"))
    assert not any(criterion.passed for criterion in judge([], "direct"))


def test_a_collapse_fails_though_the_end_is_high_enough() -> None:
    rows = [*GOOD[:4], epoch(5, cosine=0.3), *GOOD[5:]]
    failed = [criterion for criterion in judge(rows, "residual") if not criterion.passed]
    assert [criterion.name for criterion in failed] == ["fall of the val cosine, at most"]
    assert failed[0].found == pytest.approx(0.24)


def test_an_epoch_that_was_cut_short_is_not_the_last() -> None:
    assert max(criterion.epoch for criterion in judge([*GOOD, epoch(9, cosine=0.6)], "residual")) == 8


def row(name: str, accuracy: float, rank: float = 8.0, seed: int = 0) -> Row:
    noise = torch.randn(10, 30, generator=torch.Generator().manual_seed(seed)) * 0.01

    def values() -> list[Tensor]:
        return list(accuracy + noise)

    found = Measured(accuracy=values(), effective_rank=rank, data_rank=10.0)
    found.recalls[5] = values()
    return Row(name, found, None, [])


def test_better_in_both_measures_and_no_collapse_holds() -> None:
    beaten = [row("last frame", 0.7, seed=1), row("ridge", 0.75, seed=2)]
    assert verdict(row("model", 0.8), beaten, interval)[0]
    assert not verdict(row("model", 0.8, rank=4.9), beaten, interval)[0]
    holds, words = verdict(row("model", 0.72), beaten, interval)
    assert not holds
    assert [word.split(" in ")[0] for word in words[:4]] == ["better than last frame"] * 2 + ["worse than ridge"] * 2
    assert "no better than ridge" in verdict(row("model", 0.75, seed=3), beaten, interval)[1][2]


def test_one_document_establishes_nothing() -> None:
    def alone(found: Row) -> Row:
        found.held_out.accuracy = found.held_out.accuracy[:1]
        found.held_out.recalls[5] = found.held_out.recalls[5][:1]
        return found

    holds, words = verdict(alone(row("model", 0.8)), [alone(row("last frame", 0.7, seed=1))], interval)
    assert not holds
    assert words[0].startswith("not known to be better than last frame")
