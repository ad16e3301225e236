"""SpikeRollback: the oracle of support/rollback_cases.py on one process and two ranks, the judgement, the files."""

import math
import os
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer import call

from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from atlas_lm.checkpoints.listing import checkpoints_in
from callbacks.spike_rollback import SpikeRollback, TrainingUnstable
from tests.support.rollback_cases import differences, oracle, plain, sharded, train
from tests.support.toys import Line
from tests.support.two_ranks import run_on_two_ranks, shared_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*GPU available.*")


def assert_bitwise(found: dict[str, Any], rollbacks: int) -> None:
    assert found["facts"]["rollbacks"] == rollbacks
    assert len(found["facts"]["spikes"]) == rollbacks
    assert found["step"] == 10
    assert found["different"] == []


@pytest.mark.parametrize("rollbacks", [1, 2])
def test_one_process(rollbacks: int) -> None:
    assert_bitwise(oracle(rollbacks), rollbacks)


def test_the_oracle_can_fail() -> None:
    """Without the safeguard the same fault leaves another model."""
    ours = train([*range(10)], 10, bad=(6,), rollback=False)
    theirs = train([*range(10)], 10, rollback=False)
    assert any("weights" in name for name in differences(ours["state"], theirs["state"]))


@pytest.mark.parametrize("rollbacks", [1, 2])
def test_gradient_accumulation(rollbacks: int) -> None:
    assert_bitwise(oracle(rollbacks, accumulate=4), rollbacks)


def test_bf16_mixed() -> None:
    assert_bitwise(oracle(2, precision="bf16-mixed"), 2)


@pytest.mark.parametrize("rollbacks", [1, 2])
def test_stage_2_while_chunks_shrink(rollbacks: int) -> None:
    assert_bitwise(oracle(rollbacks, stage2=True), rollbacks)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_spike_at_once(value: float) -> None:
    """Seen in the very step, not at the next evaluation."""
    found = oracle(1, value=value)
    assert found["facts"]["spikes"] == [7], "the evaluation would have been at step 8"
    assert found["facts"]["rollbacks"] == 1


# Two ranks: the fault is on the second only.


def ddp_once() -> Any:
    return oracle(1, strategy="ddp", devices=2)


def ddp_twice() -> Any:
    return oracle(2, strategy="ddp", devices=2)


def fsdp_once() -> Any:
    return oracle(1, strategy=sharded, devices=2)


def fsdp_twice() -> Any:
    return oracle(2, strategy=sharded, devices=2)


def ddp_stage_2() -> Any:
    return oracle(2, strategy="ddp", devices=2, stage2=True)


def ddp_stops() -> Any:
    folder = shared_folder() / "stops"
    folder.mkdir(exist_ok=True)
    return train([*range(40)], 30, bad=tuple(range(2, 40, 2)), folder=folder, strategy="ddp", devices=2)["facts"]


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[Any]]:
    scenarios = (ddp_once, ddp_twice, fsdp_once, fsdp_twice, ddp_stage_2, ddp_stops)
    return dict(zip((s.__name__ for s in scenarios), run_on_two_ranks(*scenarios), strict=True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("scenario", "rollbacks"),
    [("ddp_once", 1), ("ddp_twice", 2), ("fsdp_once", 1), ("fsdp_twice", 2), ("ddp_stage_2", 2)],
)
def test_two_ranks(two_ranks: dict[str, list[Any]], scenario: str, rollbacks: int) -> None:
    for found in two_ranks[scenario]:
        assert isinstance(found, dict), found
        assert_bitwise(found, rollbacks)


@pytest.mark.long
def test_ranks_that_hold_the_same_keep_a_share_each(two_ranks: dict[str, list[Any]]) -> None:
    """One copy per job, not one per rank: of eight ranks with 82 GB each, a machine has no such memory."""
    alone = oracle(1)["facts"]["held"]
    for scenario in ("ddp_once", "fsdp_once"):
        for found in two_ranks[scenario]:
            assert 0.45 * alone < found["facts"]["held"] < 0.6 * alone


@pytest.mark.long
def test_two_ranks_stop_together(two_ranks: dict[str, list[Any]]) -> None:
    first, second = two_ranks["ddp_stops"]
    assert first["raised"] == second["raised"]
    assert "max_rollbacks=3" in first["raised"]
    assert first["spikes"] == second["spikes"]


# The end of the ladder, and what is on disk


@pytest.fixture(params=["at once", "in the background"])
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a Trainer that waits for its files, or of one whose files take longer than a step."""
    if request.param == "at once":
        return {}
    save = AtomicCheckpointIO.save_checkpoint

    def slow(self: Any, *arguments: Any, **options: Any) -> None:
        time.sleep(0.1)
        save(self, *arguments, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow)
    return {"plugins": [BackgroundCheckpointIO()]}


def test_the_fourth_spike_stops_with_the_last_good_checkpoint(tmp_path: Path, files: dict[str, Any]) -> None:
    found = train([*range(40)], 30, bad=tuple(range(2, 40, 2)), folder=tmp_path, **files)["facts"]
    assert found["rollbacks"] == 3
    assert len(found["spikes"]) == 4
    for step in found["spikes"]:
        assert str(step) in found["raised"]
    good = Path(found["raised"].split("checkpoint is ")[1].split(";")[0])
    state = read_checkpoint(good)
    assert all(bool(tensor.isfinite().all()) for tensor in state["state_dict"].values())
    newest = checkpoints_in(tmp_path)[0]
    assert read_checkpoint(newest)["global_step"] <= state["global_step"], "the newest is none of the spoiled ones"


def test_abandoned_checkpoints_are_marked_and_five_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any]
) -> None:
    mark = SpikeRollback._abandon

    def with_other_time_stamps(self: SpikeRollback, trainer: Any, kept: Any) -> None:
        """As if the clock had gone backwards all the time."""
        for path in tmp_path.glob("*.ckpt"):
            os.utime(path, ns=(0, 2**62 - path.lstat().st_mtime_ns), follow_symlinks=False)
        mark(self, trainer, kept)

    monkeypatch.setattr(SpikeRollback, "_abandon", with_other_time_stamps)
    found = train([*range(60)], 24, bad=(14,), folder=tmp_path, **files)["facts"]
    assert found["rollbacks"] == 1
    snapshots = [name for name in found["files"] if name.startswith("snapshot") and name.endswith(".ckpt")]
    assert snapshots == [f"snapshot-{step:07d}.ckpt" for step in (16, 18, 20, 22, 24)]
    for path in tmp_path.glob("*.ckpt"):
        content = read_checkpoint(path)
        assert content["state_dict"]["model.norm.weight"].abs().max() < 5, f"{path.name} holds the spoiled weights"
    marked = [name for name in found["files"] if ".abandoned" in name]
    assert marked == ["step-0000015.ckpt.abandoned1"]
    saved = [name for name in found["files"] if name.startswith("step-") and name.endswith(".ckpt")]
    assert saved == ["step-0000021.ckpt", "step-0000024.ckpt"]
    assert read_checkpoint(tmp_path / marked[0])["state_dict"]["model.norm.weight"].abs().max() > 5


def test_steps_that_come_again_are_saved_again(tmp_path: Path, files: dict[str, Any]) -> None:
    """A spike at the very last step, before it is saved: the run comes there again, and its end is on disk."""
    ours = train([*range(20)], 9, bad=(8,), value=math.nan, folder=tmp_path, **files)
    assert ours["facts"]["spikes"] == [9]
    assert not [name for name in ours["facts"]["files"] if ".abandoned" in name]
    assert ours["state"]["step"] == 9
    last = read_checkpoint(tmp_path / "step-0000009.ckpt")["state_dict"]
    assert differences(plain(last), ours["state"]["weights"]) == []


def test_a_run_that_dies_after_a_rollback_resumes_knowing_of_it(tmp_path: Path) -> None:
    """The file that it went back to holds the counters as they are now, and the place in the data."""
    found = train([*range(20)], 5, bad=(2,), value=math.nan, folder=tmp_path)
    assert found["facts"]["spikes"] == [3]
    content = read_checkpoint(tmp_path / "snapshot-0000000.ckpt")
    state = content["callbacks"]["SpikeRollback"]
    assert (state["rollbacks"], state["spikes"]) == (1, [3])
    assert content["global_step"] == 0
    batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    assert batches == 3, "the three dropped batches do not come again"


def test_a_healthy_run_is_bitwise_left_alone() -> None:
    ours, theirs = train([*range(10)], 10), train([*range(10)], 10, rollback=False)
    assert ours["facts"]["rollbacks"] == 0
    assert differences(ours["state"], theirs["state"]) == []


def test_counters_survive_a_resume(tmp_path: Path) -> None:
    guard = SpikeRollback(str(tmp_path))
    guard.rollbacks, guard.spikes, guard.cooldown_until, guard.ema = 2, [5, 9], 12, 3.5
    again = SpikeRollback(str(tmp_path))
    again.load_state_dict(guard.state_dict())
    assert (again.rollbacks, again.spikes, again.cooldown_until, again.ema) == (2, [5, 9], 12, 3.5)


def test_lightning_still_has_the_private_names_that_going_back_needs(fit: Any, line: Any) -> None:
    """The contract of callbacks/snapshots.py and probing.py with Lightning's inside."""
    trainer = fit(line(), max_steps=2)
    loop = trainer.fit_loop.epoch_loop
    assert trainer.global_step == loop.automatic_optimization.optim_progress.optimizer.step.total.completed == 2
    assert loop._batches_that_stepped == 2
    assert loop._should_accumulate() in (True, False)
    for progress in (loop.automatic_optimization.optim_progress, loop.scheduler_progress):
        before = progress.state_dict()
        progress.load_state_dict(before)
        assert progress.state_dict() == before
    assert callable(call._call_callbacks_on_load_checkpoint)


# The judgement on plain numbers


def test_judgement() -> None:
    guard = SpikeRollback("unused", threshold=0.05, smoothing=0.5)
    assert guard.delta(100.0) == 0.0, "nothing to compare with yet"
    guard.update_ema(100.0)
    assert guard.delta(104.0) == pytest.approx(0.04)
    assert not guard.judge(guard.delta(105.0))
    assert guard.judge(guard.delta(105.1))
    for broken in (math.nan, math.inf, -math.inf):
        assert guard.judge(guard.delta(broken))
        assert guard.judge(guard.delta(broken), quiet=True), "a cool-down excuses no NaN"
    assert not guard.judge(guard.delta(200.0), quiet=True)
    guard.update_ema(90.0)
    assert guard.ema == pytest.approx((100 * 90) ** 0.5)


def test_a_perplexity_that_is_too_small_for_a_number_is_no_division_by_zero() -> None:
    """Of some module whose loss is below −745."""
    guard = SpikeRollback("unused")
    guard.update_ema(0.0)
    assert guard.delta(0.0) == 0.0
    assert guard.judge(guard.delta(1.0))


def test_the_average_is_soon_where_the_perplexity_is() -> None:
    """That of an untrained model must not hide a spike for long: falls of a real run, looked at every 100 steps."""
    guard = SpikeRollback("unused")
    falls = [345.0, 9.2, 5.8, 4.6, 3.99, 3.75, 3.27, 3.11, 3.0, 2.75, 2.64]
    for perplexity in falls:
        assert not guard.judge(guard.delta(perplexity))
        guard.update_ema(perplexity)
    assert guard.judge(guard.delta(1.12 * falls[-1]))
    guard = SpikeRollback("unused")
    for perplexity in falls[:6]:
        guard.update_ema(perplexity)
    assert guard.judge(guard.delta(1.2 * falls[5])), "after 500 steps a rise of a fifth is seen"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 0.0), ("threshold", math.nan), ("every_n_steps", 0), ("keep_last", 1), ("max_rollbacks", -1),
        ("smoothing", 0.0), ("watch", "loss"), ("mode", "off"), ("rows", 0), ("cool_down_steps", -1),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} of spike_rollback must"):
        SpikeRollback("unused", **{name: value})


def test_a_module_that_cannot_be_probed_is_refused(fit: Any, line: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"held_out_loss.*Line does not have"):
        fit(line(), SpikeRollback(str(tmp_path)), enable_checkpointing=True)


class Jumps(Line):
    """A constant batch; the fifth one is said to be a thousand times as hard, whenever it comes."""

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = super().training_step(torch.ones_like(batch), index)
        return loss * 1000 if len(self.seen) == 5 else loss


def test_the_training_loss_can_be_watched_in_any_module(fit: Any, tmp_path: Path) -> None:
    module = Jumps()
    guard = SpikeRollback(str(tmp_path), every_n_steps=1, watch="training_loss", threshold=0.5, smoothing=1.0)
    trainer = fit(module, guard, enable_checkpointing=True)
    assert (guard.spikes, guard.rollbacks) == ([5], 1)
    assert trainer.global_step == 8
    assert len(module.seen) == 8 + 2, "back from step 5 to step 3: two steps' batches were not seen again"


def test_another_callback_may_request_a_rollback(fit: Any, tmp_path: Path) -> None:
    class Requests(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4 and not guard.rollbacks:
                guard.request_rollback("the weights have changed")

    guard = SpikeRollback(str(tmp_path), every_n_steps=1, watch="training_loss", threshold=100.0)
    trainer = fit(Line(), Requests(), guard, enable_checkpointing=True)
    assert (guard.spikes, guard.rollbacks) == ([5], 1)
    assert trainer.callback_metrics["spike_rollback/rollbacks"] == 1
    assert trainer.global_step == 8
    with pytest.raises(TrainingUnstable, match="the weights have changed"):
        SpikeRollback("unused", mode="observe").request_rollback("the weights have changed")


def test_time_is_not_rolled_back(fit: Any, tmp_path: Path) -> None:
    """Lightning's own clock would count the time before the snapshot twice, and end the run early."""
    guard = SpikeRollback(str(tmp_path), every_n_steps=1, watch="training_loss", threshold=0.5, smoothing=1.0)
    timer = Timer({"hours": 1})
    fit(Jumps(), guard, timer, enable_checkpointing=True)
    assert guard.rollbacks == 1
    assert timer._offset == 0
    assert timer.time_elapsed() < 60


def test_observing_records_and_does_nothing(fit: Any, tmp_path: Path) -> None:
    ours, theirs = Jumps(), Jumps()
    guard = SpikeRollback(str(tmp_path), every_n_steps=1, watch="training_loss", mode="observe")
    fit(ours, guard, enable_checkpointing=True)
    fit(theirs)
    assert guard.spikes
    assert guard.rollbacks == 0
    assert not list(tmp_path.glob("*.ckpt"))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
