"""What `resume` means is resolved once: the checkpoint's bytes are verified once, its header is read once."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm import files
from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.io import AtomicCheckpointIO
from atlas_lm.runs import resume
from atlas_lm.runs.resolve import run_folder
from atlas_lm.runs.stats import RunStats
from tests.support.launching import only_run, small_run

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

STEPS = "optim.total_steps=4"


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that ended after its second step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv(resume.HANDED_DOWN, raising=False)
    assert small_run(
        tmp_path, STEPS, "callbacks.step_checkpoint.every_n_steps=2", "+trainer.limit_train_batches=2"
    ) in (
        0,
        1,
    )
    run = only_run(tmp_path / "outputs")
    (run / "report.json").unlink()
    return run


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a checkpoint was hashed, its header read, its tensors read, until its run trains."""
    counts: Counter[str] = Counter()
    load, sha256 = torch.load, files.sha256

    def counting_load(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(".ckpt"):
            counts["headers" if kwargs.get("mmap") else "tensors"] += 1
        return load(path, *args, **kwargs)

    def counting_sha256(path: Path) -> str:
        counts["hashes"] += path.suffix == ".ckpt"
        return sha256(path)

    monkeypatch.setattr(torch, "load", counting_load)
    monkeypatch.setattr(manifest, "sha256", counting_sha256)
    return counts


@pytest.mark.parametrize("how", ["auto", "run", "checkpoint"])
def test_each_is_opened_once(tmp_path: Path, cut: Path, opened: Counter[str], how: str) -> None:
    named = {"auto": "auto", "run": str(cut), "checkpoint": str(cut / "checkpoints" / "last.ckpt")}[how]
    changes = [
        STEPS,
        f"resume={named}",
        "callbacks.step_checkpoint.every_n_steps=100",
        "callbacks.spike_rollback.mode=observe",
    ]
    assert small_run(tmp_path, *changes) == 0
    assert only_run(tmp_path / "outputs") == cut
    assert opened == {"hashes": 1, "headers": 1, "tensors": 1}


def test_a_rank_that_is_started_takes_rank_zeros(cut: Path, monkeypatch: pytest.MonkeyPatch, opened: Any) -> None:
    """And does not verify it again; its own search would find another one here."""
    handed = next(path for path in (cut / "checkpoints").glob("*.ckpt") if not path.is_symlink())
    monkeypatch.setenv(resume.HANDED_DOWN, str(handed))
    monkeypatch.setattr(resume, "rank", lambda: 1)
    config: Any = type("Config", (), {"resume": "auto", "paths": type("Paths", (), {"run": "elsewhere"})})
    point = resume.resume_point(config)
    assert point is not None
    assert point.checkpoint == handed
    assert (opened["hashes"], opened["headers"]) == (0, 1)


def test_rank_zero_hands_it_down_and_a_new_run_takes_it_back(cut: Path) -> None:
    config: Any = type("Config", (), {"resume": "auto", "name": "x", "paths": type("Paths", (), {"run": str(cut)})})
    point = resume.resume_point(config)
    assert point is not None
    assert os.environ[resume.HANDED_DOWN] == str(point.checkpoint.absolute())
    config.resume = None
    assert resume.resume_point(config) is None
    assert resume.HANDED_DOWN not in os.environ


def test_what_is_trusted_is_that_file_once(cut: Path) -> None:
    plugin, path = AtomicCheckpointIO(), (cut / "checkpoints" / "last.ckpt").resolve()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    plugin.verified = path
    plugin.load_checkpoint(path)
    with pytest.raises(ValueError, match="damaged"):
        plugin.load_checkpoint(path)
    plugin.verified = path.with_name("other.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        plugin.load_checkpoint(path)


def test_a_runs_counters_keep_the_name_that_stored_checkpoints_have() -> None:
    assert RunStats().state_key == "RunRecorder"


def test_a_file_that_is_none_of_the_runs_newest_begins_a_run_of_its_own(cut: Path) -> None:
    """One that a rollback abandoned, or that lies elsewhere in the run's folder, is not where that run ended."""
    newest = (cut / "checkpoints" / "last.ckpt").resolve()
    outputs, name = str(cut.parents[1]), cut.parent.name
    assert run_folder(str(newest), outputs, name, "new") == str(cut.resolve())
    content = torch.load(newest, weights_only=True)
    content["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] += 5
    for path in (newest.with_name("snapshot-7.ckpt.abandoned1"), cut / "elsewhere" / "x.ckpt"):
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        assert run_folder(str(path), outputs, name, "new") == str(cut.parent / "new")
