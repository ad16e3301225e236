"""Checkpoints are whole or absent, and those that cannot be used say why."""

import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

from atlas_lm.checkpoints.content import CheckpointError
from atlas_lm.checkpoints.io import AtomicCheckpointIO, SaveError, read_checkpoint
from atlas_lm.training.load import build_module, check_same_model, differences, load_weights
from tests.support.launching import files_no_larger_than


class Tiny(lightning.LightningModule):
    """As much of a module as a checkpoint has to do with."""

    def __init__(self, dim: int = 8, window: int = 4, vocab_size: int = 10) -> None:
        super().__init__()
        model = {"name": f"tiny{dim}", "dim": dim, "window": window}
        self.save_hyperparameters({"model": model, "vocab_size": vocab_size})
        self.layer = nn.Linear(dim, dim)


def content_of(module: Tiny) -> dict[str, Any]:
    return {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 3}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step=3.ckpt"
    AtomicCheckpointIO().save_checkpoint(content_of(Tiny()), path)
    return path


def test_round_trip(saved: Path) -> None:
    content = AtomicCheckpointIO().load_checkpoint(saved)
    assert content["global_step"] == 3
    assert content["hyper_parameters"]["model"] == {"name": "tiny8", "dim": 8, "window": 4}
    assert names(saved.parent) == ["manifest.json", "step=3.ckpt"]


def test_folders_that_are_missing_are_made(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "step=3.ckpt"
    AtomicCheckpointIO().save_checkpoint(content_of(Tiny()), path)
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 3


@pytest.mark.parametrize("size", [0, 100, 70_000, 1_000_000])
def test_a_full_disk_leaves_the_previous_checkpoint(saved: Path, size: int) -> None:
    before = saved.read_bytes()
    large = {"state_dict": {"w": torch.zeros(2_000_000)}}
    for target in (saved, saved.with_name("step=4.ckpt")):
        with files_no_larger_than(size), pytest.raises(SaveError) as caught:
            AtomicCheckpointIO().save_checkpoint(large, target)
        assert str(target) in str(caught.value)
        assert "File too large" in str(caught.value)
        assert f"the previous checkpoint is whole, resume with resume={saved}" in str(caught.value)
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["manifest.json", "step=3.ckpt"]


def test_a_failing_flush_or_rename_leaves_the_previous_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(SaveError, match="No space left on device"):
                AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, saved)
        assert saved.read_bytes() == before
        assert names(saved.parent) == ["manifest.json", "step=3.ckpt"]


def test_data_reach_the_disk_before_the_name_does(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths))[1])
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, saved)
    file, manifest = ["fsync", "replace", "fsync"], ["fsync", "replace", "fsync"]
    assert calls == ["fsync", *manifest, *file[1:], *manifest], "file, what it is, its name, no more what it was"


def test_a_bug_while_saving_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle") as caught:
        AtomicCheckpointIO().save_checkpoint({"state_dict": lambda: 0}, tmp_path / "a.ckpt")
    assert not isinstance(caught.value, SaveError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_says_so(saved: Path, kept: float) -> None:
    other = saved.with_name("step=2.ckpt")
    other.write_bytes(saved.read_bytes())
    size = saved.stat().st_size
    saved.write_bytes(saved.read_bytes()[: int(kept * size)])
    with pytest.raises(CheckpointError, match=rf"is damaged, it has \d+ bytes instead of {size}: use {other}"):
        AtomicCheckpointIO().load_checkpoint(saved)
    (saved.parent / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"truncated or not a checkpoint .*: use {other}"):
        AtomicCheckpointIO().load_checkpoint(saved)


@pytest.mark.parametrize("lazily", [False, True])
def test_wherever_it_was_cut(saved: Path, lazily: bool) -> None:
    whole = saved.read_bytes()
    (saved.parent / "manifest.json").unlink()
    for size in range(0, len(whole), 37):
        saved.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"truncated or not a checkpoint \({size} bytes\)"):
            read_checkpoint(saved, lazily=lazily)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x80\x02garbage", b"PK\x03\x04 half a zip"])
def test_other_files_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        read_checkpoint(path)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.ckpt", tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trace),)

    torch.save({"state_dict": Payload()}, path)
    with pytest.raises(CheckpointError, match="Python objects"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not trace.exists()


def test_missing_and_foreign_checkpoints(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*step=33.ckpt' \(did you mean 'step=3.ckpt'\?\)"):
        read_checkpoint(saved.with_name("step=33.ckpt"))
    saved = saved.with_name("foreign.ckpt")
    torch.save({"w": torch.zeros(1)}, saved)
    with pytest.raises(CheckpointError, match="not a checkpoint of a run"):
        read_checkpoint(saved)


def test_another_architecture_is_named_field_by_field(saved: Path) -> None:
    check_same_model(saved, read_checkpoint(saved), Tiny())
    with pytest.raises(CheckpointError) as caught:
        check_same_model(saved, read_checkpoint(saved), Tiny(dim=16, window=5, vocab_size=11))
    for words in (
        "model.dim=16 but 8 in the checkpoint",
        "model.window=5 but 4",
        "a vocabulary of 11 but 10",
        "init_from=",
    ):
        assert words in str(caught.value)
    assert "name" not in str(caught.value)


def test_what_changes_no_weights_is_no_difference() -> None:
    """A run from before there was activation checkpointing continues with it, or without."""
    assert differences({"a": 1, "name": "x"}, {"a": 1, "name": "y", "checkpoint": "block"}) == []
    assert differences({"a": 1, "checkpoint": "block"}, {"a": 1, "checkpoint": "none"}) == []


def test_a_field_that_an_older_run_did_not_have_is_at_its_default() -> None:
    assert differences({"a": 1}, {"a": 1, "share_qkv": False, "memory_layers": None}) == []
    assert differences({"a": 1}, {"a": 1, "share_qkv": True}) == [
        "model.share_qkv=True but False in the checkpoint",
    ]


def test_fields_of_other_versions_differ_too() -> None:
    assert differences({"a": 1, "old": 2}, {"a": 1, "new": 3}) == [
        "model.new=3 but absent in the checkpoint",
        "model.old=absent but 2 in the checkpoint",
    ]


def test_weights_alone(saved: Path) -> None:
    source, target = Tiny(), Tiny(window=9)
    AtomicCheckpointIO().save_checkpoint(content_of(source), saved)
    load_weights(target, saved)
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(CheckpointError, match=r"model\.dim=16 but 8 in the checkpoint"):
        load_weights(Tiny(dim=16), saved)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": 5}, "not a checkpoint of a run"),
        ({"state_dict": {"w": 5}}, "holds no plain tensor as w"),
        ({"state_dict": {"w": torch.zeros(2, device="meta")}}, "holds no plain tensor as w"),
        ({"state_dict": {"w": torch.zeros(2, 2).to_sparse()}}, "holds no plain tensor as w"),
        ({"state_dict": {}, "hyper_parameters": [1]}, "does not say which model"),
        ({"state_dict": {}, "hyper_parameters": {"model": "tiny"}}, "does not say which model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_torch_reads_and_no_model_can_use(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    for lazily in (False, True):
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(tmp_path / "a.ckpt", lazily=lazily)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"model": {}}, {"model": {"dimm": 3}, "optim": {}, "vocab_size": 9}, {"model": {}, "optim": 3}, {"x": 1}],
)
def test_a_model_that_this_version_cannot_build(tmp_path: Path, arguments: dict[str, Any]) -> None:
    content = {"state_dict": {}, "hyper_parameters": arguments}
    with pytest.raises(CheckpointError, match="no model that this version of atlas-lm can build"):
        build_module(content, tmp_path / "a.ckpt")
