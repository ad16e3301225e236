"""LossWeightSchedule: held, then faded; taken away while the watched metric degrades, and back at a lower level."""

import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.loss_weight_schedule import LossWeightSchedule
from tests.support.toys import Line, Lines


class Weighted(Line):
    """Logs `plan[step]` as the watched metric; its auxiliary loss pulls the weights towards 1."""

    def __init__(self, plan: dict[int, float] | None = None) -> None:
        super().__init__()
        self.plan = plan or {}
        self.loss_weights = {"pull": 0.0, "other": 7.0}
        self.used: list[float] = []

    def set_loss_weight(self, name: str, weight: float) -> None:
        self.loss_weights[name] = weight

    def training_step(self, batch: Any, index: int) -> Any:
        self.used.append(self.loss_weights["pull"])
        self.log("watched", self.plan.get(self.global_step, 1.0))
        return super().training_step(batch, index) + self.loss_weights["pull"] * (self.layer.weight - 1).square().sum()


def schedule(**changes: Any) -> LossWeightSchedule:
    """Constant as long as nothing degrades; the average is the metric itself."""
    plain = {"weights": {"pull": 2.0}, "total_steps": 8, "decay": 1.0, "rest_steps": 2, "smoothing": 1.0}
    return LossWeightSchedule(**{**plain, "watch": "watched", **changes})


# The judgement


def test_weights_are_held_and_then_decay() -> None:
    weights = LossWeightSchedule({"pull": 2.0}, total_steps=100)
    assert [weights.factor(step) for step in (0, 5, 10)] == [1.0] * 3
    assert weights.factor(55) == pytest.approx(0.1)
    assert weights.factor(100) == weights.factor(1000) == pytest.approx(0.01)
    falling = [weights.factor(step) for step in range(10, 101)]
    assert all(b < a for a, b in pairwise(falling))


def test_a_rise_above_the_best_rests_the_weights() -> None:
    weights = schedule(total_steps=1000, rest_steps=3)
    assert not any(weights.judge(value, step) for step, value in enumerate((2.0, 1.0, 1.04), 1))
    assert weights.judge(1.06, 4), "more than 5 % above the best, which is 1.0"
    assert [weights.factor(step) for step in range(4, 9)] == [0, 0, 0, 0.5, 0.5]
    assert not any(weights.judge(value, step) for step, value in ((5, 5.0), (6, 3.0), (7, 1.5))), "it rests already"
    assert not weights.judge(1.57, 8), "what counts is the average as the rest ended"
    assert weights.judge(1.6, 9)
    assert weights.factor(12) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_rests_them_and_stays_out_of_the_average(bad: float) -> None:
    weights = schedule(smoothing=0.5)
    assert weights.judge(bad, 1), "also as the very first value"
    assert not weights.judge(bad, 2)
    weights.judge(4.0, 3)
    assert weights.judge(bad, 4)
    assert weights.average == weights.best == 4.0


def test_metrics_below_zero_degrade_upwards_too() -> None:
    weights = schedule()
    assert not any(weights.judge(value, step) for step, value in enumerate((-1.0, -2.0, -1.95), 1))
    assert weights.judge(-1.8, 4)


def test_a_rest_of_one_step() -> None:
    weights = schedule(rest_steps=1)
    assert [weights.judge(value, step) for step, value in enumerate((1.0, 2.0, 2.0, 2.0), 1)] == [0, 1, 0, 0]


def test_the_average_smooths() -> None:
    weights = schedule(smoothing=0.1)
    assert not any(weights.judge(value, step) for step, value in enumerate((1.0, 1.4), 1)), "one value is not enough"
    assert weights.average == pytest.approx(1.04)
    assert weights.judge(1.4, 3)


# In training


def test_every_step_uses_its_weight(fit: Any) -> None:
    module, lines = Weighted(), Lines()
    fit(module, schedule(hold=0.5, decay=16.0, watch=None), logger=lines)
    assert module.used == pytest.approx([2, 2, 2, 2, 2, 1, 0.5, 0.25])
    assert module.loss_weights["other"] == 7.0, "what is not named is left alone"
    logged = [row["loss_weight_schedule/pull"] for _, row in lines.rows if "loss_weight_schedule/pull" in row]
    assert logged == pytest.approx(module.used)


@pytest.mark.parametrize("bad", [2.0, math.nan])
def test_it_takes_them_away_and_brings_them_back(fit: Any, caplog: pytest.LogCaptureFixture, bad: float) -> None:
    module = Weighted({2: bad})
    fit(module, schedule())
    assert module.used == [2, 2, 2, 0, 0, 1, 1, 1]
    reported = [text for name, _, text in caplog.record_tuples if name == "callbacks.loss_weight_schedule"]
    assert len(reported) == 1
    assert reported[0].startswith("step 3: watched has degraded (now ")
    assert reported[0].endswith("rest until step 5, then at 0.5")


def test_weights_of_zero_have_nothing_to_lose(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(Weighted({2: 2.0}), schedule(weights={"pull": 0.0}))
    assert not [record for record in caplog.records if record.name == "callbacks.loss_weight_schedule"]


def test_it_counts_optimizer_steps(fit: Any) -> None:
    module = Weighted({1: 2.0})
    fit(module, schedule(), accumulate_grad_batches=2, max_steps=5)
    assert module.used == [2, 2, 2, 2, 0, 0, 0, 0, 1, 1]


def test_it_is_silent_and_bitwise_inert_on_a_healthy_run(
    fit: Any, same_training: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Weighted()
    plain.loss_weights["pull"] = 2.0
    with caplog.at_level(logging.WARNING, "callbacks.loss_weight_schedule"):
        same_training(fit(Weighted(), schedule()), fit(plain))
    assert not [record for record in caplog.records if record.name == "callbacks.loss_weight_schedule"]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
@pytest.mark.parametrize(("step", "rest"), [(4, [0, 1, 1, 1]), (6, [1, 1])])
def test_a_resumed_run_continues(fit: Any, tmp_path: Path, step: int, rest: list[float]) -> None:
    """In the middle of a rest, and after it."""
    fit(Weighted({2: 2.0}), schedule(), max_steps=step).save_checkpoint(tmp_path / "a.ckpt")
    module = Weighted()
    fit(module, schedule(), ckpt_path=tmp_path / "a.ckpt")
    assert module.used == rest


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_the_best_survives_a_resume(fit: Any, tmp_path: Path) -> None:
    fit(Weighted(), schedule(), max_steps=4).save_checkpoint(tmp_path / "a.ckpt")
    module = Weighted(dict.fromkeys(range(4, 8), 1.5))
    fit(module, schedule(), ckpt_path=tmp_path / "a.ckpt")
    assert module.used == [2, 0, 0, 1], "1.5 is worse than the 1.0 before the break"


# Refusals


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weights": {}}, r"weights=\{\} .*must name losses"),
        ({"weights": {"pull": -1.0}}, r"weights=\{'pull': -1.0\}"),
        ({"weights": {"pull": math.nan}}, r"weights=\{'pull': nan\}"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"hold": 1.0}, r"hold=1.0 .*\[0, 1\)"),
        ({"decay": 0.5}, "decay=0.5"),
        ({"tolerance": -0.1}, "tolerance=-0.1 .*5 %"),
        ({"rest_steps": 0}, "rest_steps=0"),
        ({"backoff": 1.5}, "backoff=1.5"),
        ({"smoothing": 0.0}, "smoothing=0.0"),
    ],
)
def test_values_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        schedule(**changes)


def test_the_module_is_checked_before_step_0(fit: Any, line: Any) -> None:
    with pytest.raises(TypeError, match=r"needs loss_weights and set_loss_weight\(\), which Line lacks"):
        fit(line(), schedule())
    with pytest.raises(ValueError, match="there is no loss pul; there are pull, other"):
        fit(Weighted(), schedule(weights={"pul": 1.0}))


def test_a_metric_that_nobody_logs_is_an_error(fit: Any) -> None:
    module = Weighted()
    with pytest.raises(ValueError, match=r"watch=val/los of loss_weight_schedule was not logged; there are .*watched"):
        fit(module, schedule(watch="val/los"))
    assert len(module.seen) == 1


def test_it_waits_for_the_first_validation(fit: Any) -> None:
    validating = {"val_check_interval": 4, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    weights = schedule(watch="val/loss")
    fit(Weighted(), weights, **validating)
    assert weights.average is not None
    module = Weighted()
    with pytest.raises(ValueError, match=r"watch=val/los .*val/loss"):
        fit(module, schedule(watch="val/los"), **validating)
    assert len(module.seen) == 5, "the step after the first validation"


def test_the_average_of_a_tensor_metric_stays_a_plain_number() -> None:
    weights = schedule()
    weights.judge(float(torch.tensor(1.5)), 1)
    state = weights.state_dict()
    assert all(type(value) in (int, float) for name, value in state.items() if name != "of")
    assert type(state["of"]) is str


# Stages


STAGES = [{"epoch": 3, "pull": 1.0}, {"epoch": 2, "pull": 0.5, "other": 0.25}]


def test_stages_follow_the_epoch_and_do_not_decay() -> None:
    weights = schedule(weights={"pull": 2.0}, stages=STAGES, decay=100.0)
    assert [weights.weights_at(10**6, epoch) for epoch in (1, 2, 3, 9)] == [
        {"pull": 2.0, "other": 0.0}, {"pull": 0.5, "other": 0.25}, {"pull": 1.0, "other": 0.0},
        {"pull": 1.0, "other": 0.0},
    ]  # fmt: skip


def test_stages_rest_and_come_back_lower() -> None:
    weights = schedule(stages=STAGES, rest_steps=3)
    weights.judge(1.0, 1)
    assert weights.judge(2.0, 5)
    assert weights.weights_at(7, 3)["pull"] == 0
    assert weights.weights_at(8, 3)["pull"] == 0.5


def test_a_run_uses_the_weights_of_its_epoch(fit: Any) -> None:
    module = Weighted()
    fit(module, schedule(weights={"pull": 0.0}, stages=STAGES), limit_train_batches=2, max_steps=8)
    assert module.used == [0, 0, 0.5, 0.5, 1, 1, 1, 1]


@pytest.mark.parametrize(("steps", "warns"), [(2, True), (4, False)])
def test_a_run_too_short_for_its_stages_says_so(
    fit: Any, caplog: pytest.LogCaptureFixture, steps: int, warns: bool
) -> None:
    fit(Weighted(), schedule(weights={"pull": 0.0}, stages=STAGES), limit_train_batches=2, max_steps=steps)
    assert (f"{steps} steps are {steps // 2} epochs" in caplog.text) == warns


@pytest.mark.parametrize("stages", [[{"pull": 1.0}], [{"epoch": 0}], [{"epoch": 1.5}], [{"epoch": 2}, {"epoch": 2}]])
def test_a_stage_without_an_epoch_of_its_own_is_refused(stages: Any) -> None:
    with pytest.raises(ValueError, match="epoch"):
        schedule(stages=stages)


def test_a_stage_that_names_no_loss_is_refused(fit: Any) -> None:
    with pytest.raises(ValueError, match="nope"):
        fit(Weighted(), schedule(stages=[{"epoch": 2, "nope": 1.0}]))


def test_a_weight_of_null_is_left_alone() -> None:
    assert schedule(weights={"pull": 1.0, "other": None}).weights == {"pull": 1.0}
