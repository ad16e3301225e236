"""What the benchmark of next-vector prediction makes of what runs have logged and of tested rows."""

from typing import Any

import pytest
import torch

from atlas_lm.latent.five_cat import Gate, Measured
from atlas_lm.latent.rows import Row
from benchmarks.latent import cost_lines, curve, drift_of, lines_of, rate_lines, summary, v3_figure, v3_lines


def logged(epoch: int, cosine: float, peak: float = 1.0, margin: float = 0.02, ratio: float | None = None) -> Any:
    return {
        "epoch": float(epoch - 1), "val/cosine": cosine, "val/contrastive_accuracy": 0.8, "val/effective_rank": 0.1,
        "five_cat_probe/peak": peak, "five_cat_probe/margin": margin, "five_cat_probe/peak_seen": 0.0,
        "five_cat_probe/margin_seen": -0.1, "latent/guard_ratio": ratio,
    }  # fmt: skip


def test_drift_is_counted_from_the_third_epoch_on() -> None:
    rows = [logged(1, 0.4, peak=2.0, margin=-0.1), logged(3, 0.5), logged(4, 0.5, peak=2.0, margin=-0.1)]
    assert drift_of(rows) == {"epochs": 2, "unseen": 1, "seen": 2}
    assert drift_of([*rows, {"epoch": 5.0, "val/cosine": 0.5}])["epochs"] == 2, "an epoch that was cut short"


def test_a_curve_has_the_ratio_of_each_epoch_with_guards() -> None:
    found = curve([logged(3, 0.5), logged(4, 0.4, ratio=4.0), {"epoch": 3.0, "latent/guard_ratio": 6.0}])
    assert found["epochs"] == [3, 4]
    assert found["cosine"] == [0.5, 0.4]
    assert found["guard_ratio"] == {"4": 5.0}
    table = v3_lines({"no cap": [found]})
    assert "| no cap | 0 | 0.500 | 0.400 | 0.400 | 5.0 |" in table
    assert len(v3_figure({"no cap": [found]}).axes) == 2


def row(name: str, value: float, rank: float = 8.0) -> Row:
    found = Measured(
        cosine=[torch.full((4,), value)] * 3, accuracy=[torch.full((4,), value)] * 3,
        reciprocal=[torch.full((4,), value)] * 3, chance={"recall_at_5": 0.1}, effective_rank=rank, data_rank=10.0,
    )  # fmt: skip
    found.recalls = {k: [torch.full((4,), value)] * 3 for k in (1, 5, 10)}
    found.raw_recalls = found.recalls
    return Row(name, found, None, [Gate("A", "x", "held-out", 1.0, "≥ 0", True)])


@pytest.mark.parametrize(("value", "rank", "holds"), [(0.9, 8.0, True), (0.9, 4.0, False), (0.6, 8.0, False)])
def test_a_model_holds_by_the_mean_of_its_seeds(value: float, rank: float, holds: bool) -> None:
    from atlas_lm.cli.latent_tables import as_json

    beaten = [row("last frame", 0.5), row("ridge", 0.7)]
    rows = [row("m", value - 0.01, rank), row("m", value + 0.01, rank)]
    found = summary(rows, beaten)
    assert found["holds"] is holds
    assert found["accuracy"]["mean"] == pytest.approx(value)
    assert found["accuracy"]["over ridge"][0] == pytest.approx(value - 0.7)
    text = lines_of(
        {
            "baselines": [as_json(x) for x in beaten],
            "summary": {"m": found},
            "documents": 3,
            "seeds": 2,
            "audit": "audit: x",
            "drift": {"m": [{"epochs": 2, "unseen": 0, "seen": 2}] * 2},
        }
    )
    assert ("**no model**" in text) is not holds
    assert f"{value:.3f} ± 0.014" in text
    assert "Drift in 2 runs, 4 epochs" in text


def test_costs_are_of_pairs_and_a_rate_that_did_not_finish_is_a_dash() -> None:
    table = cost_lines({"probe alone": [11.0, 22.0, 10.1], "neither": [10.0, 20.0, 10.0]})
    assert "| probe alone | 11.0 | +10.0 % (+1.0 to +10.0) |" in table
    assert "| neither | 10.0 | – |" in table
    assert "| P1 | – | 0.800 / 0.400 | 0.700 / 0.300 |" in rate_lines({"P1": {"1.0": [0.8, 0.4], "2.0": [0.7, 0.3]}})
