"""StepCheckpoint keeps the newest, the last step included."""

import os
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.io import AtomicCheckpointIO, SaveError
from callbacks import step_checkpoint
from callbacks.spike_rollback import SpikeRollback
from callbacks.step_checkpoint import StepCheckpoint


@pytest.fixture(params=["at once", "in the background"], autouse=True)
def fit(request: pytest.FixtureRequest, fit: Any) -> Any:
    """Training waits for files, or does not."""
    if request.param == "at once":
        return fit
    return lambda *a, **k: fit(*a, **{"plugins": [BackgroundCheckpointIO()], **k})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")


def test_it_keeps_the_newest_and_links_the_last(fit: Any, line: Any, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    fit(line(), StepCheckpoint(str(folder), every_n_steps=2, keep=2))
    assert names(folder) == ["last.ckpt", "step-0000006.ckpt", "step-0000008.ckpt"]
    assert (folder / "last.ckpt").resolve().name == "step-0000008.ckpt"


@pytest.mark.parametrize("every", [3, 5, 100])
def test_the_final_step_is_saved_when_it_is_not_its_turn(fit: Any, line: Any, tmp_path: Path, every: int) -> None:
    folder, module = tmp_path / "c", line()
    fit(module, StepCheckpoint(str(folder), every_n_steps=every, keep=1))
    assert names(folder) == ["last.ckpt", "step-0000008.ckpt"]
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert torch.equal(saved["state_dict"]["layer.weight"], module.layer.weight)


def test_the_last_step_lies_within_its_epoch(fit: Any, line: Any, tmp_path: Path) -> None:
    """Lightning counts the epoch as done when training ends: a run that is given more steps would skip the rest."""
    fit(line(), StepCheckpoint(str(tmp_path), every_n_steps=100), max_steps=3)
    loop = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert loop["epoch_progress"]["current"]["completed"] == 0
    assert loop["epoch_loop.batch_progress"]["current"]["ready"] == 3


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_resuming_into_another_folder_leaves_the_first_alone(fit: Any, line: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    fit(line(), StepCheckpoint(str(first), every_n_steps=2, keep=2), max_steps=4)
    before = names(first)
    resumed = StepCheckpoint(str(second), every_n_steps=2, keep=1)
    trainer = fit(line(), resumed, ckpt_path=first / "last.ckpt")
    assert trainer.global_step == 8
    assert names(first) == before
    assert names(second) == ["last.ckpt", "step-0000008.ckpt"]


@pytest.mark.parametrize(("name", "changes"),
    [
        ("every_n_steps=0", {"every_n_steps": 0}), ("keep=0", {"keep": 0}),
        ("every_n_minutes=0", {"every_n_minutes": 0}), ("every_n_minutes=nan", {"every_n_minutes": float("nan")}),
    ],
)  # fmt: skip
def test_counts_are_checked(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name} of checkpoint must be"):
        StepCheckpoint(**{"folder": "x", "every_n_steps": 1, **changes})  # type: ignore[arg-type]


def test_minutes_count_too(fit: Any, line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_checkpoint.time, "monotonic", lambda: now[0])

    class AMinuteAStep(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 60

    folder = tmp_path / "c"
    fit(line(), AMinuteAStep(), StepCheckpoint(str(folder), every_n_steps=5, keep=9, every_n_minutes=1.5))
    assert names(folder) == ["last.ckpt", *(f"step-000000{step}.ckpt" for step in (2, 4, 5, 7, 8))]


def test_what_a_killed_process_left_is_cleared_away(fit: Any, line: Any, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for step in (1, 2, 3):
        (folder / f"step-000000{step}.ckpt").write_text("left")
    fit(line(), StepCheckpoint(str(folder), every_n_steps=4, keep=2))
    assert names(folder) == ["last.ckpt", "step-0000004.ckpt", "step-0000008.ckpt"]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_a_clock_that_was_set_back_costs_no_new_checkpoint(fit: Any, line: Any, tmp_path: Path) -> None:
    """Files of the process before have time stamps from an hour ahead."""
    folder = tmp_path / "c"

    def safeguards() -> list[Any]:
        return [
            StepCheckpoint(str(folder), every_n_steps=2, keep=2),
            SpikeRollback(str(folder), every_n_steps=2, keep_last=3, watch="training_loss", threshold=1e9),
        ]

    fit(line(), *safeguards(), max_steps=8)
    for path in folder.glob("*.ckpt"):
        os.utime(path, (time.time() + 3600,) * 2, follow_symlinks=False)
    second = safeguards()
    fit(line(), *second, max_steps=16, ckpt_path=folder / "step-0000008.ckpt")
    steps = [f"step-00000{step}.ckpt" for step in (14, 16)]
    snapshots = [f"snapshot-00000{step}.ckpt" for step in (12, 14, 16)]
    assert [name for name in names(folder) if name.endswith(".ckpt")] == ["last.ckpt", *snapshots, *steps]
    assert [kept.path.name for kept in second[1].snapshots if kept.path is not None] == snapshots


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_a_later_file_that_was_not_resumed_from_goes_first(fit: Any, line: Any, tmp_path: Path) -> None:
    """It is damaged, say, and must not take the place of an intact one."""
    folder = tmp_path / "c"
    fit(line(), StepCheckpoint(str(folder), every_n_steps=4, keep=2), max_steps=4)
    (folder / "step-0000900.ckpt").write_text("damaged")
    saver = StepCheckpoint(str(folder), every_n_steps=1, keep=2)
    fit(line(), saver, max_steps=6, ckpt_path=folder / "step-0000004.ckpt")
    assert names(folder) == ["last.ckpt", "step-0000005.ckpt", "step-0000006.ckpt"]


def test_files_that_only_look_like_ours_stay(fit: Any, line: Any, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for name in ("step-best.ckpt", "step-0000001-copy.ckpt"):
        (folder / name).write_text("somebody's")
    fit(line(), StepCheckpoint(str(folder), every_n_steps=2, keep=1))
    assert names(folder) == ["last.ckpt", "step-0000001-copy.ckpt", "step-0000008.ckpt", "step-best.ckpt"]


def test_without_links_there_are_checkpoints_all_the_same(
    fit: Any, line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refused)
    fit(line(), StepCheckpoint(str(tmp_path / "c"), every_n_steps=8))
    assert names(tmp_path / "c") == ["step-0000008.ckpt"]
    assert "Operation not supported" in caplog.text


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> float:
    """What each file takes; seconds."""
    save = AtomicCheckpointIO.save_checkpoint

    def slow(self: Any, *arguments: Any, **options: Any) -> None:
        time.sleep(0.3)
        save(self, *arguments, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", slow)
    return 0.3


@pytest.mark.parametrize("background", [False, True])
def test_how_long_training_waits_is_logged(
    fit: Any, line: Any, tmp_path: Path, slow_disk: float, background: bool
) -> None:
    plugin = BackgroundCheckpointIO() if background else AtomicCheckpointIO()
    trainer = fit(line(), StepCheckpoint(str(tmp_path), every_n_steps=7), plugins=[plugin])
    stall = float(trainer.callback_metrics[step_checkpoint.STALL])
    assert (stall < slow_disk / 3) if background else (stall >= slow_disk)


def test_the_link_and_the_oldest_change_when_the_new_file_is_there(
    fit: Any, line: Any, tmp_path: Path, slow_disk: float
) -> None:
    class Seen(lightning.Callback):
        usable = True

        def on_train_batch_end(self, *_: Any) -> None:
            link = tmp_path / "last.ckpt"
            self.usable &= link.exists() or not link.is_symlink()

    seen = Seen()
    fit(line(), seen, StepCheckpoint(str(tmp_path), every_n_steps=1, keep=1), plugins=[BackgroundCheckpointIO()])
    assert seen.usable
    assert (tmp_path / "last.ckpt").resolve().name == "step-0000008.ckpt"


def test_a_file_that_failed_in_the_background_stops_training_soon(
    fit: Any, line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SaveError("no room")

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", full)
    module, saver = line(), StepCheckpoint(str(tmp_path), every_n_steps=2)
    with pytest.raises(SaveError, match="no room"):
        fit(module, saver, plugins=[BackgroundCheckpointIO()], max_steps=1000)
    assert module.trainer.global_step < 10
    with pytest.raises(SaveError, match="no room"):  # the last one of a run
        fit(line(), StepCheckpoint(str(tmp_path), every_n_steps=100), plugins=[BackgroundCheckpointIO()], max_steps=3)


def test_only_rank_zero_looks_at_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank would list what rank zero is just removing, and stop a healthy run."""
    for i in range(9):
        (tmp_path / f"step-{i:07d}.ckpt").touch()
        (tmp_path / f"snapshot-{i:07d}.ckpt").touch()
    callbacks: list[Any] = [StepCheckpoint(str(tmp_path), every_n_steps=1), SpikeRollback(str(tmp_path))]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("looked"))
    callbacks[0]._remove_oldest(None, tmp_path / "step-0000008.ckpt")
    callbacks[1]._remove_oldest(None, set())
