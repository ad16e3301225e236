"""FiveCatProbe: silent while predictions are nearest to the next frame; takes the guards away when they are not."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from callbacks.five_cat_probe import Drift, FiveCatProbe
from callbacks.loss_weight_schedule import LossWeightSchedule
from tests.support.toys import STEPS, Line, Lines, loader
from tests.support.two_ranks import run_on_two_ranks, shared_folder

FORWARD = {1: 0.6, 0: 0.9, 2: 0.4}  # what is nearest to it among the frames not seen is the next one
BACKWARD = {-5: 0.7, 1: 0.6, 0: 0.9}


class Predicting(Line):
    """`plan`: epoch → cosine by offset, 0.1 elsewhere, from that epoch on; its guards pull the weights towards 1."""

    def __init__(self, plan: dict[int, dict[int, float]]) -> None:
        super().__init__()
        self.plan, self.loss_weights, self.used = plan, {"future": 0.0, "direction": 0.0}, list[tuple[int, float]]()
        self.rows: list[int] = []

    def set_loss_weight(self, name: str, weight: float) -> None:
        self.loss_weights[name] = weight

    def training_step(self, batch: Any, index: int) -> Any:
        self.used.append((self.current_epoch + 1, sum(self.loss_weights.values())))
        pull = sum(self.loss_weights.values()) * (self.layer.weight - 1).square().sum()
        return super().training_step(batch, index) + pull

    def offset_cosines(self, batch: Any, offsets: Any) -> Any:
        self.rows.append(len(batch))
        cosines = self.plan[max(epoch for epoch in self.plan if epoch <= self.current_epoch + 1)]
        return torch.tensor([cosines.get(k, 0.1) for k in offsets]).repeat(len(batch), 1)


def schedule() -> LossWeightSchedule:
    return LossWeightSchedule({"future": 0.1, "direction": 0.2}, STEPS * 100, hold=0.9, decay=1.0)


def epochs(fit: Any, module: Any, *callbacks: Any, count: int = 5, **changes: Any) -> Any:
    """So many epochs of two steps, with a validation after each."""
    return fit(module, *callbacks, limit_train_batches=2, limit_val_batches=1, max_steps=2 * count, **changes)


# The judgement


def cosines_of(found: dict[int, float]) -> dict[int, float]:
    return {k: found.get(k, 0.1) for k in FiveCatProbe().offsets}


def test_the_offsets_are_those_of_the_context_and_three_on_either_side() -> None:
    assert FiveCatProbe().offsets == list(range(-7, -4)) + list(range(-3, 4))
    assert FiveCatProbe(context=2).unseen == [-4, -3, -2, 1, 2, 3]


def test_a_peak_elsewhere_without_a_margin_is_drift() -> None:
    probe = FiveCatProbe()
    assert probe.judge(cosines_of(FORWARD)) is None
    assert probe.sweep(cosines_of(FORWARD), "unseen") == (1, pytest.approx(0.2))
    found = probe.judge(cosines_of(BACKWARD))
    assert found is not None
    assert "-5" in found
    assert "-0.1000" in found


def test_the_seeds_offsets_call_any_slow_text_drift() -> None:
    assert FiveCatProbe(among="seen").judge(cosines_of(FORWARD)) is not None


def test_what_is_not_finite_is_drift() -> None:
    assert FiveCatProbe().judge(cosines_of({1: math.nan})) is not None


def test_offsets_that_no_row_has_are_left_out() -> None:
    found = cosines_of(FORWARD) | dict.fromkeys((-7, -6, -5), math.nan)
    assert FiveCatProbe().sweep(found, "unseen") == (1, pytest.approx(0.2))
    alone = {k: math.nan if k != 1 else 0.5 for k in found}
    peak, margin = FiveCatProbe().sweep(alone, "unseen")
    assert peak == 1
    assert math.isnan(margin)


@pytest.mark.parametrize(
    ("name", "value"), [("samples", 0), ("context", 1), ("from_epoch", 0), ("among", "all"), ("act", "warn")]
)
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FiveCatProbe(**{name: value})


# It acts


def test_drift_takes_the_guards_away_until_a_test_finds_none(fit: Any, caplog: Any) -> None:
    module = Predicting({1: FORWARD, 3: BACKWARD, 5: FORWARD})
    probe = FiveCatProbe(samples=1, from_epoch=3)
    with caplog.at_level(logging.WARNING, "callbacks.five_cat_probe"):
        epochs(fit, module, schedule(), probe, count=7)
    weights = {epoch: weight for epoch, weight in module.used}
    assert weights == {1: pytest.approx(0.3), 2: pytest.approx(0.3), 3: pytest.approx(0.3), 4: 0.0, 5: 0.0,
                       6: pytest.approx(0.3), 7: pytest.approx(0.3)}  # fmt: skip
    assert probe.back_offs == len(caplog.records) == 2


def test_before_its_epoch_it_only_logs(fit: Any) -> None:
    module, lines = Predicting({1: BACKWARD, 3: FORWARD}), Lines()
    epochs(fit, module, schedule(), FiveCatProbe(from_epoch=3), logger=lines)
    assert all(weight > 0 for _, weight in module.used)
    drift = [row["five_cat_probe/drift"] for _, row in lines.rows if "five_cat_probe/drift" in row]
    assert drift == [1, 1, 0, 0, 0]


def test_it_stops_where_it_is_told_to(fit: Any) -> None:
    module = Predicting({1: BACKWARD})
    with pytest.raises(Drift, match="epoch 3"):
        epochs(fit, module, FiveCatProbe(act="stop"))
    assert len(module.used) == 6


def test_observing_leaves_the_weights(fit: Any) -> None:
    module = Predicting({1: BACKWARD})
    probe = FiveCatProbe(act="observe")
    epochs(fit, module, schedule(), probe)
    assert all(weight > 0 for _, weight in module.used)
    assert probe.back_offs == 3


# It does not disturb


def test_a_healthy_run_is_bitwise_the_run_without_it(fit: Any, same_training: Any) -> None:
    ours, theirs = Predicting({1: FORWARD}), Predicting({1: FORWARD})
    a = epochs(fit, ours, schedule(), FiveCatProbe())
    b = epochs(fit, theirs, schedule())
    same_training(a, b)
    assert ours.used == theirs.used


def test_a_resumed_run_still_holds_the_guards_back(fit: Any, tmp_path: Path) -> None:
    module = Predicting({1: BACKWARD})
    trainer = epochs(fit, module, schedule(), FiveCatProbe(), count=3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = Predicting({1: BACKWARD})
    epochs(fit, resumed, schedule(), FiveCatProbe(), count=4, ckpt_path=tmp_path / "x.ckpt")
    assert [weight for _, weight in resumed.used] == [0, 0]


# What it needs


def test_it_must_come_after_the_schedule_that_would_set_the_weights_again(fit: Any) -> None:
    with pytest.raises(ValueError, match="after loss_weight_schedule"):
        epochs(fit, Predicting({1: FORWARD}), FiveCatProbe(), schedule())


def test_a_module_without_frames_is_refused(fit: Any) -> None:
    with pytest.raises(TypeError, match="offset_cosines"):
        epochs(fit, Line(), FiveCatProbe())


def test_a_module_without_weights_may_be_observed(fit: Any) -> None:
    class Weightless(Line):
        def offset_cosines(self, batch: Any, offsets: Any) -> Any:
            return torch.ones(len(batch), len(offsets))

    with pytest.raises(TypeError, match="loss_weights"):
        epochs(fit, Weightless(), FiveCatProbe())
    epochs(fit, Weightless(), FiveCatProbe(act="observe"))


# Two ranks


def drift_on_one() -> Any:
    class Uneven(Predicting):
        def offset_cosines(self, batch: Any, offsets: Any) -> Any:
            found = super().offset_cosines(batch, offsets)
            return found if self.trainer.global_rank == 0 else found + (torch.tensor(list(offsets)) == -5) * 1.5

    module = Uneven({1: FORWARD})
    trainer = lightning.Trainer(
        callbacks=[schedule(), FiveCatProbe()], accelerator="cpu", devices=2, strategy="ddp", max_steps=10,
        logger=False, enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=shared_folder(), num_sanity_val_steps=0, limit_train_batches=2, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(module, loader(), loader())
    return module.used


@pytest.mark.long
def test_two_ranks_back_off_together() -> None:
    [(first, second)] = run_on_two_ranks(drift_on_one)
    assert first == second
    assert first[-1][1] == 0
