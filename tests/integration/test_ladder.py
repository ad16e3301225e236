"""The ladder through train.py, as a user meets it: skip, roll back, stop with all saved; what the records say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.checkpoints.listing import newest_checkpoint
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.training.module import AtlasModule
from tests.support.launching import only_run, report_of, small_run

# Without the guard that would see the spoiled weights first: this is the ladder of those who watch the losses
EVALUATIONS = [
    "callbacks.spike_rollback.every_n_steps=2",
    "trainer.val_check_interval=100",
    "~callbacks.weight_integrity",
]


def spoil(monkeypatch: pytest.MonkeyPatch, batches: set[int], fault: Any) -> None:
    """Let `fault(module, loss)` act on the loss of these training batches, counted over the whole run."""
    step, seen = AtlasModule.training_step, []

    def spoiled(self: Any, batch: Any, index: int) -> Any:
        loss = step(self, batch, index)
        seen.append(index)
        return fault(self, loss) if len(seen) - 1 in batches else loss

    monkeypatch.setattr(AtlasModule, "training_step", spoiled)


def weights_times_thirty(module: Any, loss: torch.Tensor) -> torch.Tensor:
    module.model.norm.weight.data.mul_(30.0)
    return loss


def test_a_step_that_is_not_finite_is_skipped_and_the_run_continues(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {2}, lambda module, loss: loss * math.nan)
    assert small_run(in_tmp, "optim.total_steps=6", *EVALUATIONS) == 0
    run = only_run(in_tmp / "outputs")
    found = report_of(run)
    assert (found["status"], found["steps"], found["skipped_steps"]) == ("finished", 6, 1)
    assert found["verdict"].endswith("; 1 skipped step on the way")
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("nonfinite_guard/skipped_steps") == 1] == [2]
    assert {row["rollback_count"] for row in rows if row["rollback_count"] is not None} == {0}, "the model was sound"
    assert found["val_loss"] is not None


def test_a_spike_is_rolled_back_and_recorded(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {6}, weights_times_thirty)
    assert small_run(in_tmp, "optim.total_steps=10", *EVALUATIONS) == 0
    run = only_run(in_tmp / "outputs")
    found = report_of(run)
    assert (found["status"], found["rollbacks"], found["skipped_steps"]) == ("finished", 1, None)
    assert found["verdict"].endswith("; 1 rollback on the way")
    rows = read_rows(run / "metrics.jsonl")
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    steps = [row["global_step"] for row in rows if row["global_step"] is not None]
    back = next(i for i in range(1, len(steps)) if steps[i] < steps[i - 1])
    assert (steps[back - 1], steps[back]) == (7, 4), "the evaluation after step 8 went back to step 4"
    assert steps[-1] == 10
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "the loggers' step never goes back"
    timeline = [row["timeline"] for row in rows]
    assert timeline == sorted(timeline)
    assert (timeline[0], timeline[-1]) == (0, 1)
    spike = next(row for row in rows if (row["ppl_delta"] or 0) > 0.05)
    assert (spike["rollback_count"], spike["global_step"]) == (1, 4)
    assert "back to step 4 (rollback 1 of at most 3)" in (run / "train.log").read_text()


def test_the_fourth_spike_stops_with_everything_saved(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        spoil(patched, set(range(4, 100, 3)), weights_times_thirty)
        assert small_run(in_tmp, "optim.total_steps=40", *EVALUATIONS) == 1
    printed = capsys.readouterr()
    line = next(line for line in printed.err.splitlines() if line.startswith("error: "))
    assert "max_rollbacks=3" in line
    assert "the last good checkpoint is" in line
    assert "Traceback" not in printed.err
    run = only_run(in_tmp / "outputs")
    found = report_of(run)
    assert found["status"] == "failed"
    assert "TrainingUnstable" in found["verdict"]
    assert found["rollbacks"] == 3
    assert (run / "report.md").exists()
    newest = newest_checkpoint(run)
    assert newest is not None
    assert str(newest) in line, "the newest checkpoint is the last good one: the spoiled ones are marked"
    good = read_checkpoint(newest)["state_dict"]
    assert good["model.norm.weight"].abs().max() < 5
    assert small_run(in_tmp, "name=again", f"init_from={newest}", "optim.total_steps=1") == 0


def test_observing_is_left_to_the_one_who_asks(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {4}, weights_times_thirty)
    assert small_run(in_tmp, "optim.total_steps=8", *EVALUATIONS, "callbacks.spike_rollback.mode=observe") == 0
    rows = read_rows(only_run(in_tmp / "outputs") / "metrics.jsonl")
    assert max(row["ppl_delta"] for row in rows if row["ppl_delta"] is not None) > 0.05
    assert {row["rollback_count"] for row in rows if row["rollback_count"] is not None} == {0}


def test_weights_that_change_by_themselves_are_rolled_back_in_the_very_step(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All safeguards as they are configured."""
    spoil(monkeypatch, {6}, weights_times_thirty)
    settings = [setting for setting in EVALUATIONS if "weight_integrity" not in setting]
    assert small_run(in_tmp, "optim.total_steps=10", *settings) == 0
    run = only_run(in_tmp / "outputs")
    assert report_of(run)["rollbacks"] == 1
    rows = read_rows(run / "metrics.jsonl")
    assert next(row["step"] for row in rows if row.get("weight_integrity/corruptions") == 1) == 6
    assert (
        "weights changed outside the optimizer before step 6: rank 0: model.norm.weight"
        in (run / "train.log").read_text()
    )
