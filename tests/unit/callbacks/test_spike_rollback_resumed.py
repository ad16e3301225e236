"""A resumed run beside the same one that was never interrupted: it goes back to the same moment, bitwise."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from atlas_lm.training.strategies import FullySharded
from tests.support.rollback_cases import interrupted, sharded, train
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
        path = folder / "snapshot-0000002.ckpt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # in a tensor: its header is readable
        path.write_bytes(content)

    found = interrupted(5, 12, bad=(4,), folder=tmp_path, between=damage, plugins=[AtomicCheckpointIO()])["again"]
    assert (found["rollbacks"], found["spikes"], found["raised"]) == (1, [6], None)
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cannot go back to" in text and "snapshot-0000002.ckpt" in text and "damaged" in text for text in warned)
    assert any("back to step 0 " in text for text in warned)


def test_no_snapshot_can_be_read(tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        for path in folder.glob("snapshot-*.ckpt"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    found = interrupted(5, 12, bad=(4,), folder=tmp_path, between=damage, plugins=[AtomicCheckpointIO()])["again"]
    assert "has no snapshot that can be read, see above: resume an earlier checkpoint" in found["raised"]


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


def fsdp_shards() -> Any:
    settings = {"strategy": shards, "devices": 2, "plugins": [AtomicCheckpointIO()]}
    return interrupted(5, 12, bad=(4,), folder=shared_folder() / "shards", **settings)


@pytest.mark.long
def test_two_ranks() -> None:
    for ranks in run_on_two_ranks(ddp, fsdp_one_file, fsdp_shards):
        for found in ranks:
            assert isinstance(found, dict), found
            assert_same(found, rollbacks=1)
