"""OutlierGuard: garbage is skipped and its steps are regained; healthy losses, however noisy, are left alone."""

import math
import os
import random
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from callbacks.outlier_guard import LossOutliers, OutlierGuard
from callbacks.spike_rollback import SpikeRollback
from tests.support.toys import STEPS, Line, loader
from tests.support.two_ranks import run_on_two_ranks


class Garbage(Line):
    """A constant batch, a loss of about 10; the n-th ones (from 1) have one ten times as large."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.garbage, self.before = bad, []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.before.append(self.layer.weight.detach().clone())
        loss = 10 + super().training_step(torch.ones_like(batch), index)
        return loss * 10 if len(self.seen) in self.garbage else loss


def guard(**changes: Any) -> OutlierGuard:
    return OutlierGuard(**{"warm_up": 2, "window": 4, "streak": 2, "max_consecutive": 3, **changes})


# In training


def test_an_outlier_changes_no_weight_and_no_moment(fit: Any, same_training: Any) -> None:
    module, watching = Garbage(4), guard()
    trainer = fit(module, watching)
    assert watching.outliers == 1
    assert torch.equal(module.before[3], module.before[4]), "the step of the fourth batch was skipped"
    assert not torch.equal(module.before[4], module.before[5])
    assert trainer.callback_metrics["outlier_guard/outliers"] == 1
    assert trainer.global_step == STEPS


def test_steps_of_a_streak_are_regained(fit: Any, tmp_path: Path) -> None:
    module, watching = Garbage(4, 5), guard()
    rollback = SpikeRollback(str(tmp_path), every_n_steps=1, watch="training_loss", threshold=1e300)
    trainer = fit(module, watching, rollback, enable_checkpointing=True)
    assert (watching.outliers, rollback.rollbacks, watching.consecutive) == (2, 1, 0)
    assert trainer.global_step == STEPS
    assert len(module.seen) > STEPS, "the skipped steps came again, with other batches"


def test_a_streak_over_several_evaluations_is_regained_whole_and_once(fit: Any, tmp_path: Path) -> None:
    """No snapshot is taken in its middle: whoever returned to one would not get the steps before it back."""
    module, watching = Garbage(4, 5, 6), guard(max_consecutive=5)
    rollback = SpikeRollback(str(tmp_path), every_n_steps=1, watch="training_loss", threshold=1e300)
    trainer = fit(module, watching, rollback, enable_checkpointing=True)
    assert (watching.outliers, rollback.rollbacks) == (3, 1)
    assert trainer.global_step == STEPS
    assert len(module.seen) == 7 + STEPS - 2, "back from step 7 to step 2, with other batches"


def test_one_outlier_is_worth_no_rollback(fit: Any, tmp_path: Path) -> None:
    rollback = SpikeRollback(str(tmp_path), every_n_steps=1, watch="training_loss", threshold=1e300)
    fit(Garbage(4), guard(), rollback, enable_checkpointing=True)
    assert rollback.rollbacks == 0


def test_too_many_in_a_row_stop_the_run(fit: Any) -> None:
    module = Garbage(*range(3, 99))
    with pytest.raises(LossOutliers, match=r"4 such steps in a row are more than max_consecutive=3"):
        fit(module, guard())
    assert torch.equal(module.before[2], module.layer.weight), "intact"


def test_a_healthy_run_is_bitwise_left_alone(fit: Any, same_training: Any) -> None:
    watching = guard()
    same_training(fit(Line(), watching), fit(Line()))
    assert watching.outliers == 0


def test_accumulated_batches_are_judged_together(fit: Any) -> None:
    watching = guard()
    fit(Garbage(7), watching, accumulate_grad_batches=2, max_steps=5)
    assert watching.outliers == 1
    assert len(watching.losses) == 4


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_the_window_survives_a_resume(fit: Any, tmp_path: Path) -> None:
    first = guard()
    fit(Garbage(), first, max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    again = guard()
    fit(Garbage(1), again, ckpt_path=tmp_path / "4.ckpt", max_steps=6)
    assert again.outliers == 1, "the first batch of the resumed run is compared with those before"


def test_counts_do_not_go_back_and_streaks_do() -> None:
    watching = guard()
    for loss in (1.0, 1.1, 0.9):
        watching.judge(loss)
    snapshot = watching.state_dict()
    watching.outliers, watching.consecutive = 5, 5
    watching.judge(2.0e9)
    watching.setup(None, None, "fit")  # type: ignore[arg-type]
    watching.load_state_dict({**snapshot, "outliers": 5, "consecutive": 4})
    assert (watching.outliers, watching.consecutive) == (5, 4), "a resumed run continues with its streak"
    watching.on_train_start(lightning.Trainer(accelerator="cpu", logger=False, barebones=True), None)  # type: ignore[arg-type]
    watching.load_state_dict({**snapshot, "consecutive": 4})
    assert (watching.outliers, watching.consecutive) == (5, 0)
    assert list(watching.losses) == [1.0, 1.1, 0.9]


def one_rank_gets_garbage() -> Any:
    module = Garbage(*((4,) if os.environ["RANK"] == "1" else ()))
    watching = guard()
    trainer = lightning.Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_steps=STEPS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[watching], limit_val_batches=0, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader())
    return watching.outliers, torch.equal(module.before[3], module.before[4]), module.layer.weight.tolist()


@pytest.mark.long
def test_ranks_skip_together() -> None:
    ((first, second),) = run_on_two_ranks(one_rank_gets_garbage)
    assert first == second
    assert first[:2] == (1, True)


# The judgement


def test_far_out_is_far_out() -> None:
    watching = OutlierGuard(deviations=8, window=50, warm_up=30)
    draw = random.Random(0)
    healthy = [5 * math.exp(-i / 100) + 1.2 + draw.gauss(0, 0.2) for i in range(2000)]
    assert not any(watching.judge(loss) for loss in healthy), "a falling, noisy loss"
    assert watching.judge(5.6), "random bytes"
    assert not watching.judge(2.0), "a hard page"
    assert not watching.judge(math.nan)
    assert not watching.judge(math.inf)
    assert all(math.isfinite(loss) for loss in watching.losses)


def test_nothing_is_an_outlier_at_first() -> None:
    watching = OutlierGuard(warm_up=30)
    assert not any(watching.judge(loss) for loss in [5.0, 1e9] * 14)
    assert watching.limit() == math.inf


def test_losses_that_do_not_vary_are_no_trap() -> None:
    watching = OutlierGuard(warm_up=2, window=50)
    for _ in range(50):
        assert not watching.judge(2.0)
    assert not watching.judge(2.1)
    assert watching.judge(2.4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("warm_up=1", {"warm_up": 1}), ("window=29", {"window": 29}), ("streak=0", {"streak": 0}),
        ("max_consecutive=2", {"max_consecutive": 2}), ("deviations=0", {"deviations": 0}),
        ("deviations=nan", {"deviations": math.nan}),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name} of outlier_guard must"):
        OutlierGuard(**changes)
