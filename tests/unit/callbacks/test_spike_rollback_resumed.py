"""A resumed run beside the same one that was never interrupted: it goes back to the same moment, bitwise."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from atlas_lm.training import strategies
from atlas_lm.training.strategies import FullySharded
from callbacks.weight_integrity import WeightIntegrity
from tests.support.rollback_cases import Asks, differences, interrupted, rank, sharded, train
from tests.support.two_ranks import run_on_two_ranks, shared_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*GPU available.*")


def assert_same(found: dict[str, Any], rollbacks: int) -> None:
    assert found["whole"]["rollbacks"] == rollbacks
    for name in ("rollbacks", "spikes", "raised", "ema"):
        assert found["again"][name] == found["whole"][name]
    assert found["different"] == []


@pytest.mark.parametrize(
    "plugins", [[], [AtomicCheckpointIO()], [BackgroundCheckpointIO()]], ids=["torch", "atomic", "background"]
)
def test_interrupted_in_a_spike(tmp_path: Path, plugins: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """Spoiled in step 5, saved and resumed there, found at step 6: back to step 2, as without the interruption."""
    found = interrupted(5, 12, bad=(4,), folder=tmp_path, plugins=plugins)
    assert (
        read_checkpoint(tmp_path / "parts" / "step-0000005.ckpt.abandoned1")["state_dict"]["model.norm.weight"]
        .abs()
        .max()
        > 5
    )
    assert_same(found, rollbacks=1)
    assert "where this run is resumed: if that is still so at the next evaluation, it goes back to" in caplog.text
    assert "snapshot-0000002.ckpt" in caplog.text


def test_interrupted_before_a_spike(tmp_path: Path) -> None:
    """The two snapshots before the spike are one of this process and one of the process before."""
    assert_same(interrupted(5, 12, bad=(6,), folder=tmp_path), rollbacks=1)


def test_interrupted_twice_as_far_back(tmp_path: Path) -> None:
    """Two spikes in a row: the file that the run went back to is written again, and serves again."""
    assert_same(interrupted(5, 14, bad=(4, 8), folder=tmp_path), rollbacks=2)


def test_interrupted_in_a_rise_that_is_over_at_the_next_evaluation(tmp_path: Path) -> None:
    """Between two evaluations a healthy run may lie above its average: it is judged when it would have been."""
    found = interrupted(5, 10, bad=(4, 5), folder=tmp_path, value=-1.0)
    assert_same(found, rollbacks=0)


def test_what_is_not_finite_is_found_in_the_first_step(tmp_path: Path) -> None:
    """The weights are NaN in the checkpoint itself; the step before it was healthy."""

    def spoil(folder: Path) -> None:
        path = folder / "step-0000005.ckpt"
        content = read_checkpoint(path)
        content["state_dict"]["model.norm.weight"].fill_(math.nan)
        torch.save(content, path)

    found = interrupted(5, 8, bad=(), folder=tmp_path, between=spoil)["again"]
    assert (found["rollbacks"], found["spikes"], found["raised"]) == (1, [6], None)


def test_a_damaged_snapshot_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def damage(folder: Path) -> None:
        flip(folder / "snapshot-0000002.ckpt")

    found = interrupted(5, 12, bad=(4,), folder=tmp_path, between=damage, plugins=[AtomicCheckpointIO()])["again"]
    assert (found["rollbacks"], found["spikes"], found["raised"]) == (1, [6], None)
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cannot go back to" in text and "snapshot-0000002.ckpt" in text and "damaged" in text for text in warned)
    assert any("back to step 0 " in text for text in warned)


def flip(path: Path) -> None:
    """A bit in a tensor: the header stays readable."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_snapshot_is_the_last_resort(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def damage(folder: Path) -> None:
        flip(folder / "snapshot-0000000.ckpt")
        flip(folder / "snapshot-0000002.ckpt")

    found = interrupted(5, 12, bad=(4,), folder=tmp_path, between=damage, plugins=[AtomicCheckpointIO()])["again"]
    assert (found["rollbacks"], found["raised"]) == (1, None)
    assert "back to step 4 " in caplog.text


def test_no_snapshot_can_be_read(tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        for path in folder.glob("snapshot-*.ckpt"):
            flip(path)

    found = interrupted(5, 12, bad=(4,), folder=tmp_path, between=damage, plugins=[AtomicCheckpointIO()])["again"]
    assert "has no snapshot that can be read, see above: resume an earlier checkpoint" in found["raised"]


def test_a_snapshot_whose_file_came_too_late_is_taken_again(tmp_path: Path) -> None:
    """A signal ends the run in the step in which a snapshot is due, before its file is written."""

    def lose(folder: Path) -> None:
        (folder / "snapshot-0000006.ckpt").unlink()

    assert_same(interrupted(6, 12, bad=(6,), folder=tmp_path, between=lose), rollbacks=1)


def test_resumed_right_after_a_rollback(tmp_path: Path) -> None:
    """Back at step 4, which is the end of the first part: its snapshot is written again with the place in the data."""

    def only_saved(folder: Path) -> None:
        assert "snapshot-0000004.ckpt" in [path.name for path in folder.iterdir()]

    assert_same(interrupted(7, 16, bad=(6, 12), folder=tmp_path, between=only_saved), rollbacks=2)


class Spoils(lightning.Callback):
    """A weight changes outside the optimizer before the batches 6 and 14 are trained on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if int(batch["number"]) in (6, 14):
            with torch.no_grad():
                pl_module.model.norm.weight[0] += 1e-3  # too little for a spike


def test_a_safeguard_that_no_file_knows_watches_on_after_a_rollback(tmp_path: Path) -> None:
    """weight_integrity was added at the resume: the file that it goes back to has no sums of its."""
    train([*range(20)], 5, folder=tmp_path)
    found = train(
        [*range(5, 40)], 14, folder=tmp_path, ckpt_path=tmp_path / "step-0000005.ckpt", more=[WeightIntegrity, Spoils]
    )["facts"]
    assert (found["rollbacks"], found["raised"]) == (2, None)


class Healthy(lightning.Callback):
    """No snapshot is taken at step 12."""

    blocks_snapshot = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.blocks_snapshot = trainer.global_step == 12


def test_a_snapshot_of_another_timeline_is_none_of_this_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It lies in the folder under the step of one that this timeline has not taken."""
    train([*range(20)], 12, folder=tmp_path)
    other = [*range(100, 140)]
    train(other, 13, folder=tmp_path, ckpt_path=tmp_path / "step-0000009.ckpt", more=[Healthy])
    assert int(read_checkpoint(tmp_path / "snapshot-0000012.ckpt")["state_dict"]["seen"]) == sum(range(12))
    train(other[4:], 20, bad=(106,), folder=tmp_path, ckpt_path=tmp_path / "step-0000013.ckpt", more=[Healthy])
    assert "back to step 10 " in caplog.text


def test_after_a_time_without_snapshots_the_present_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What lies in the folder is from long ago."""
    train([*range(10)], 6, folder=tmp_path)
    train([*range(10, 40)], 15, folder=tmp_path, ckpt_path=tmp_path / "step-0000006.ckpt", mode="observe")
    train([*range(50, 90)], 20, bad=(50,), folder=tmp_path, ckpt_path=tmp_path / "step-0000015.ckpt")
    assert "back to step 15 " in caplog.text


class Constant(lightning.Callback):
    """A buffer that no state dict has, spoiled in step 6."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.register_buffer("constant", torch.ones(2), persistent=False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        if int(batch["number"]) == 5:
            pl_module.constant.fill_(math.nan)


def test_buffers_that_no_file_has_are_restored(tmp_path: Path) -> None:
    assert_same(interrupted(5, 12, bad=(), folder=tmp_path, more=[Constant, Asks]), rollbacks=1)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averaged_weights_do_not_take_the_place_of_the_model(tmp_path: Path) -> None:
    """They lie in its place in the file, and in a snapshot: its own weights are in another."""
    average = [lambda: EMAWeightAveraging(decay=0.5), Asks]
    averaged = interrupted(5, 12, bad=(), folder=tmp_path / "a", more=average)
    assert_same(averaged, rollbacks=1)
    plain = train([*range(24)], 12, folder=tmp_path / "b", more=[Asks])
    ours = train([*range(24)], 12, folder=tmp_path / "c", more=average)
    assert plain["state"]["step"] == ours["state"]["step"]
    assert differences(plain["state"]["optimizer"], ours["state"]["optimizer"]) == [], "the gradients were the same"


def test_without_snapshots_a_checkpoint_of_a_spike_is_refused(tmp_path: Path) -> None:
    """It would become the snapshot to go back to. The advice is a snapshot that lies beside it."""
    first, second = tmp_path / "first", tmp_path / "second"
    train([*range(20)], 5, bad=(4,), folder=first)
    spoiled = first / "step-0000005.ckpt"
    assert read_checkpoint(spoiled)["state_dict"]["model.norm.weight"].abs().max() > 5
    raised = train([*range(20)], 9, folder=second, ckpt_path=spoiled)["facts"]["raised"]
    assert "this checkpoint was written in a spike" in raised
    advised = Path(raised.split("resume an earlier one, ")[1])
    assert advised == first.resolve() / "snapshot-0000004.ckpt"
    assert train([*range(20)], 9, folder=second, ckpt_path=advised)["facts"]["raised"] is None
    for path in first.glob("snapshot-*"):
        path.unlink()
    raised = train([*range(20)], 9, folder=tmp_path / "third", ckpt_path=spoiled)["facts"]["raised"]
    assert raised.endswith("resume an earlier one")


def test_advice_is_of_an_earlier_moment(tmp_path: Path) -> None:
    """The snapshots that lie beside the spoiled checkpoint are of the run that has continued since."""
    run = tmp_path / "run"
    train([*range(20)], 5, bad=(4,), folder=run)
    shutil.copy(run / "step-0000005.ckpt", tmp_path)
    train([*range(5, 40)], 12, folder=run, ckpt_path=run / "step-0000005.ckpt")
    assert (run / "snapshot-0000012.ckpt").exists()
    spoiled = shutil.copy(tmp_path / "step-0000005.ckpt", run / "spoiled.ckpt")
    raised = train([*range(20)], 9, folder=tmp_path / "new", ckpt_path=spoiled)["facts"]["raised"]
    assert raised.endswith("has no snapshot of this run to go back to: resume an earlier one")


def test_who_only_observes_does_not_speak_of_snapshots(tmp_path: Path) -> None:
    train([*range(20)], 5, folder=tmp_path)
    content = read_checkpoint(tmp_path / "step-0000005.ckpt")
    content["state_dict"]["model.norm.weight"].fill_(math.nan)
    torch.save(content, tmp_path / "step-0000005.ckpt")
    path = tmp_path / "step-0000005.ckpt"
    raised = train([*range(20)], 9, folder=tmp_path, ckpt_path=path, mode="observe")["facts"]["raised"]
    assert raised.endswith(f"written in a spike: resume an earlier one, {tmp_path / 'snapshot-0000004.ckpt'}")


def test_later_snapshots_are_of_another_future(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Resumed from an older checkpoint of its folder: what was written after that is nothing to go back to."""
    order = [*range(30)]
    train(order, 12, folder=tmp_path)
    assert (tmp_path / "snapshot-0000012.ckpt").exists()
    found = train(order[9:], 12, bad=(9,), folder=tmp_path, ckpt_path=tmp_path / "step-0000009.ckpt")["facts"]
    assert (found["rollbacks"], found["spikes"]) == (1, [10])
    assert "back to step 6 " in caplog.text


# Two ranks: the fault is on the second only.


def shards() -> FullySharded:
    return FullySharded(save_distributed_checkpoint=True)


def ddp() -> Any:
    """A checkpoint has rank zero's weights, which are healthy: the fault comes after it."""
    return interrupted(5, 12, bad=(6,), folder=shared_folder() / "ddp", strategy="ddp", devices=2)


def fsdp_one_file() -> Any:
    return interrupted(5, 12, bad=(4,), folder=shared_folder() / "fsdp", strategy=sharded, devices=2)


def settings() -> dict[str, Any]:
    return {"strategy": shards, "devices": 2, "plugins": [AtomicCheckpointIO()]}


def fsdp_shards() -> Any:
    return interrupted(5, 12, bad=(4,), folder=shared_folder() / "shards", **settings())


def fsdp_sums() -> Any:
    """A file has the sums of rank zero alone."""
    more = [WeightIntegrity, Asks]
    return interrupted(5, 12, bad=(), folder=shared_folder() / "sums", more=more, **settings())


def fsdp_one_file_sums() -> Any:
    more = [WeightIntegrity, Asks]
    return interrupted(5, 12, bad=(), folder=shared_folder() / "sums1", more=more, strategy=sharded, devices=2)


class Unlinks(lightning.Callback):
    """A snapshot is removed after the run has found it."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 0 and trainer.ckpt_path:
            (Path(trainer.default_root_dir) / "snapshot-0000002.ckpt").unlink(missing_ok=True)


def fsdp_missing() -> Any:
    return interrupted(5, 12, bad=(4,), folder=shared_folder() / "missing", more=[Unlinks], **settings())["again"]


def fsdp_one_rank_cannot_read() -> Any:
    """Past the first look at it, in the strategy itself."""
    read = strategies.read_checkpoint

    def fails(path: Path, *args: Any, **kwargs: Any) -> Any:
        if rank() == 1 and "snapshot-0000002" in str(path):
            raise OSError(5, "Input/output error")
        return read(path, *args, **kwargs)

    strategies.read_checkpoint = fails
    try:
        return interrupted(5, 12, bad=(4,), folder=shared_folder() / "one", **settings())["again"]
    finally:
        strategies.read_checkpoint = read


@pytest.mark.long
def test_two_ranks() -> None:
    same = (ddp, fsdp_one_file, fsdp_shards, fsdp_sums, fsdp_one_file_sums)
    *found, missing, unreadable = run_on_two_ranks(*same, fsdp_missing, fsdp_one_rank_cannot_read)
    for ranks in found:
        for each in ranks:
            assert isinstance(each, dict), each
            assert_same(each, rollbacks=1)
    for each in (*missing, *unreadable):  # none waits for the other: both go further back
        assert isinstance(each, dict), each
        assert (each["rollbacks"], each["spikes"], each["raised"]) == (1, [6], None)
