"""Sharded checkpoints: whole or absent, whatever kills a rank; damage is found; no code is run; read as one file."""

import os
import pickle
import random
import shutil
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from atlas_lm.checkpoints import manifest, shards
from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.io import AtomicCheckpointIO, CheckpointError, SaveError, read_checkpoint
from atlas_lm.checkpoints.listing import checkpoints_in, newest_usable, why_unusable
from atlas_lm.training.strategies import FullySharded
from callbacks.spike_rollback import SpikeRollback
from callbacks.step_checkpoint import StepCheckpoint
from tests.support.two_ranks import run_on_two_ranks, shared_folder, start_two_ranks
from tests.unit.checkpoints.test_checkpoint import files_no_larger_than, names


def content(step: int = 3) -> dict[str, Any]:
    """As `trainer=fsdp` hands it to its strategy; of one process."""
    moments = {"model.a": {"exp_avg": torch.full((4, 2), step + 0.5)}, "model.b": {"exp_avg": torch.ones(3)}}
    groups = [{"params": ["model.b"], "lr": 0.1}, {"params": ["model.a"], "lr": 0.2}]
    return {
        "state_dict": {"model.a": torch.full((4, 2), float(step)), "model.b": torch.zeros(3, dtype=torch.bfloat16)},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "global_step": step,
        "sharded": True,
    }


def save(path: Path, step: int = 3) -> Path:
    """Write it; the folder of its shards."""
    header, tensors = shards.header_of(content(step))
    folder = path.parent / shards.fresh_name(path)
    folder.mkdir()
    header[shards.SHARDS] = {"folder": folder.name, "files": shards.write(tensors, folder, 0)}
    AtomicCheckpointIO().save_checkpoint(header, path)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step-0000003.ckpt"
    save(path)
    return path


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_it_reads_as_a_checkpoint_in_one_file(saved: Path) -> None:
    found, wanted = read_checkpoint(saved), content()
    for name, tensor in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor)
        assert found["state_dict"][name].dtype == tensor.dtype
    optimizer = found["optimizer_states"][0]
    assert [group["params"] for group in optimizer["param_groups"]] == [[0], [1]], "numbered by group, as torch does"
    assert torch.equal(optimizer["state"][1]["exp_avg"], torch.full((4, 2), 3.5))
    assert (found["global_step"], found["sharded"]) == (3, False)
    assert shards.SHARDS not in found


def test_its_header_is_read_without_its_tensors(saved: Path) -> None:
    shutil.rmtree(saved.parent / manifest.read(saved.parent)[saved.name]["shards"]["folder"])
    header = read_checkpoint(saved, lazily=True)
    assert header["global_step"] == 3
    assert header["state_dict"] == {}


@pytest.mark.parametrize("how", ["missing", "cut", "a bit", "all of it"])
def test_damage_to_a_shard_is_damage_to_the_checkpoint(saved: Path, how: str) -> None:
    other = saved.with_name("step-0000002.ckpt")
    save(other, 2)
    folder = saved.parent / manifest.read(saved.parent)[saved.name]["shards"]["folder"]
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(whole[:-1])
    elif how == "a bit":
        path.write_bytes(whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:])
    else:
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=rf"{folder.name}.*use {other}"):
        read_checkpoint(saved)
    assert newest_usable(saved.parent) == other
    if how in ("missing", "all of it"):  # also where no manifest knows of it
        (saved.parent / manifest.MANIFEST).unlink()
        with pytest.raises(CheckpointError, match=folder.name):
            read_checkpoint(saved)


@pytest.mark.parametrize("change", [{"shards": {}}, {"shards": 3}, {"optimizer_states": [{}]}, {"optimizer_states": 7}])
def test_a_header_of_something_else_is_said(saved: Path, change: dict[str, Any]) -> None:
    header = torch.load(saved, weights_only=True)
    (saved.parent / manifest.MANIFEST).unlink()
    torch.save({**header, **change}, saved)
    with pytest.raises(CheckpointError, match="its shards are not those that it names"):
        read_checkpoint(saved)


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("bad", [Code(), [1], b"", None])
def test_an_index_runs_no_code(saved: Path, bad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved.parent / manifest.read(saved.parent)[saved.name]["shards"]["folder"]
    (folder / ".metadata").write_bytes(bad if isinstance(bad, bytes) else pickle.dumps(bad))
    (saved.parent / manifest.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(saved)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    """torch would unpickle it freely."""
    (tmp_path / "x").mkdir()
    shards.write({"state_dict": {"a": Plain()}}, tmp_path / "x", 0)
    with pytest.raises(shards.ShardsError, match="BytesStorageMetadata"):
        shards.read(tmp_path / "x")


class Plain:
    pass


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    large = {"state_dict": {"a": torch.ones(100_000)}}
    with files_no_larger_than(10_000), pytest.raises(OSError):  # noqa: PT011  # torch does not hand on the system's words
        shards.write(large, tmp_path / "x", 0)


def test_replaced_and_removed_checkpoints_take_their_shards_along(saved: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, saved.with_name("other.ckpt"))
    assert len(list(saved.parent.glob(f"*{shards.ENDING}"))) == 1, "what others have stays"
    saved.with_name("other.ckpt").unlink()
    kept = save(saved.with_name("step-0000004.ckpt"), 4)
    abandoned = save(saved.with_name("step-0000005.ckpt"), 5)
    saved.with_name("step-0000005.ckpt").rename(saved.with_name("step-0000005.ckpt.abandoned1"))
    (saved.parent / f"killed.0{shards.ENDING}").mkdir()
    AtomicCheckpointIO().remove_checkpoint(saved)
    assert {path.name for path in saved.parent.glob(f"*{shards.ENDING}")} == {kept.name, abandoned.name}
    AtomicCheckpointIO().remove_checkpoint(saved.with_name("step-0000004.ckpt"))
    assert names(saved.parent) == sorted(["manifest.json", "step-0000005.ckpt.abandoned1", abandoned.name])


def test_where_a_checkpoint_cannot_be_read_no_shards_are_removed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be whole again in a minute."""
    (saved.parent / manifest.MANIFEST).unlink()
    save(saved.with_name("step-0000004.ckpt"), 4)
    read = torch.load

    def broken(path: Any, *a: Any, **k: Any) -> Any:
        if Path(path).name == saved.name:
            raise OSError(5, "Input/output error")
        return read(path, *a, **k)

    monkeypatch.setattr(torch, "load", broken)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, saved.with_name("step-0000005.ckpt"))
    assert len(list(saved.parent.glob(f"*{shards.ENDING}"))) == 2
    assert "cannot be read" in caplog.text


# Two ranks


class Counting(lightning.LightningModule):
    """Every weight is the number of steps, and so is its moment: a mixture of two saves shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 256, bias=False)
        nn.init.zeros_(self.layer.weight)

    def configure_model(self) -> None:
        if not hasattr(self.layer, "unshard"):
            fully_shard(self.layer)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = -self.layer(batch).sum()
        return loss + (1 - loss.detach())

    def held_out_loss(self, batch: Tensor) -> Tensor:
        return torch.zeros(())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.5)


def fit(folder: Path, steps: int, *callbacks: Any, background: bool = True, ckpt: Any = None) -> lightning.Trainer:
    plugin = BackgroundCheckpointIO() if background else AtomicCheckpointIO()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=2, strategy=FullySharded(save_distributed_checkpoint=True),
        callbacks=list(callbacks), plugins=[plugin], logger=False, enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    data = DataLoader(torch.ones(steps + 1, 64), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(Counting(), data, ckpt_path=ckpt)
    return trainer


def saves() -> Any:
    folder = shared_folder() / "saves"
    fit(folder, 5, StepCheckpoint(str(folder), every_n_steps=1, keep=2))
    return names(folder)


def waits() -> Any:
    folder = shared_folder() / "waits"
    fit(folder, 3, StepCheckpoint(str(folder), every_n_steps=1, keep=2), background=False)
    return {name: read_checkpoint(folder / name)["global_step"] for name in names(folder) if name.endswith(".ckpt")}


def resumes() -> Any:
    folder = shared_folder() / "resumes"
    fit(folder, 3, StepCheckpoint(str(folder), every_n_steps=3))
    module = fit(folder, 5, StepCheckpoint(str(folder), every_n_steps=5), ckpt=folder / "last.ckpt").lightning_module
    whole = folder / "whole"
    fit(whole, 5, StepCheckpoint(str(whole), every_n_steps=5))
    a, b = (read_checkpoint(path / "last.ckpt") for path in (folder, whole))
    moments = [x["optimizer_states"][0]["state"][0]["momentum_buffer"] for x in (a, b)]
    return (
        torch.equal(a["state_dict"]["layer.weight"], b["state_dict"]["layer.weight"]),
        torch.equal(*moments),
        float(module.layer.weight.full_tensor().max()) == float(a["state_dict"]["layer.weight"].max()) > 0,
    )


def rolls_back() -> Any:
    folder = shared_folder() / "rolls_back"

    class Request(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4 and guard.rollbacks == 0:
                guard.request_rollback("a test")

    guard = SpikeRollback(str(folder), every_n_steps=2, watch="training_loss", threshold=1e9, keep_last=2)
    fit(folder, 8, Request(), StepCheckpoint(str(folder), every_n_steps=3), guard)
    found = [path.name for path in folder.glob(f"*{shards.ENDING}")]
    wanted = {shards.folder_in(path) for path in folder.glob("*.ckpt*") if path.is_file()}
    return (
        guard.rollbacks,
        sorted(found) == sorted(wanted),
        all(why_unusable(p) is None for p in checkpoints_in(folder)),
    )


def a_rank_cannot_read_its_files() -> Any:
    """After they are written: the others must not wait for it for half an hour."""
    folder, sha256 = shared_folder() / "unreadable", shards.sha256

    def broken(path: Path) -> str:
        if path.name.startswith("__1_"):
            raise OSError(5, "Input/output error")
        return sha256(path)

    shards.sha256 = broken
    try:
        fit(folder, 3, StepCheckpoint(str(folder), every_n_steps=3))
    except SaveError as error:
        return str(error), list(folder.glob(f"*{shards.ENDING}")) if rank() == 0 else []
    finally:
        shards.sha256 = sha256


def rank() -> int:
    return int(os.environ["RANK"])


def a_rank_has_no_room() -> Any:
    folder = shared_folder() / "no_room"
    write = shards.write

    def full(tensors: Any, folder: Path, rank: int, group: Any = None) -> Any:
        if rank == 1:
            with files_no_larger_than(1000):
                return write(tensors, folder, rank, group)
        return write(tensors, folder, rank, group)

    shards.write = full
    try:
        fit(folder, 3, StepCheckpoint(str(folder), every_n_steps=3))
    except SaveError as error:
        return str(error), newest_usable(folder)
    finally:
        shards.write = write


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[Any]]:
    scenarios = (saves, waits, resumes, rolls_back, a_rank_has_no_room, a_rank_cannot_read_its_files)
    return dict(zip((s.__name__ for s in scenarios), run_on_two_ranks(*scenarios), strict=True))


@pytest.mark.long
def test_each_rank_writes_its_part_and_the_newest_are_kept(two_ranks: dict[str, list[Any]]) -> None:
    found = two_ranks["saves"][0]  # rank zero removes the oldest
    files = [name for name in found if not name.endswith(shards.ENDING)]
    assert files == ["last.ckpt", "manifest.json", "step-0000004.ckpt", "step-0000005.ckpt"]
    assert [name[:12] for name in found if name.endswith(shards.ENDING)] == ["step-0000004", "step-0000005"]


@pytest.mark.long
def test_training_may_wait_for_it(two_ranks: dict[str, list[Any]]) -> None:
    assert two_ranks["waits"][0] == {"last.ckpt": 3, "step-0000002.ckpt": 2, "step-0000003.ckpt": 3}


@pytest.mark.long
def test_resumed_it_is_bitwise_the_whole_run(two_ranks: dict[str, list[Any]]) -> None:
    assert two_ranks["resumes"] == [(True, True, True)] * 2


@pytest.mark.long
def test_a_rollback_leaves_no_shards_behind(two_ranks: dict[str, list[Any]]) -> None:
    assert two_ranks["rolls_back"][0] == (1, True, True)  # rank zero removes what is left


@pytest.mark.long
def test_a_rank_without_room_stops_all(two_ranks: dict[str, list[Any]]) -> None:
    for found in two_ranks["a_rank_has_no_room"]:
        assert "free space" in found[0]
        assert found[1] is None


@pytest.mark.long
def test_a_rank_that_fails_alone_tells_the_others(two_ranks: dict[str, list[Any]]) -> None:
    for found in two_ranks["a_rank_cannot_read_its_files"]:
        assert "Input/output error" in found[0]
        assert found[1] == [], "and leaves no shards behind"


def save_for_ever() -> Any:
    folder = shared_folder()
    fit(folder, 100_000, StepCheckpoint(str(folder), every_n_steps=1, keep=2))


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save_it_is_never_half(tmp_path: Path) -> None:
    seen, draw = set(), random.Random(0)
    for _ in range(20):
        ranks = start_two_ranks(tmp_path, save_for_ever)
        before = set(tmp_path.glob("*.ckpt"))
        while set(tmp_path.glob("*.ckpt")) <= before:  # it saves, one file after another
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "stderr0").read_text()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        for rank in draw.sample(ranks, 2):
            rank.kill()
        for rank in ranks:
            rank.wait()
        usable = [path for path in checkpoints_in(tmp_path) if why_unusable(path) is None]
        assert usable, "those before it are still there"
        for path in usable:
            found = read_checkpoint(path)
            step, weights = found["global_step"], found["state_dict"]["layer.weight"]
            velocity = found["optimizer_states"][0]["state"][0]["momentum_buffer"]
            assert weights.unique().tolist() == [weights[0, 0].item()], "of one save"
            assert velocity.unique().tolist() == pytest.approx([0.5 ** (step - 1) - 2]), "of this step"
            seen.add(step)
        for path in tmp_path.glob("*.ckpt"):
            assert path.is_symlink() or why_unusable(path) is None, "a file that has its name is whole"
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(seen) > 5
