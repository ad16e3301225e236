"""train.py as a user meets it: resume, Ctrl-C, full disk, damaged and foreign checkpoints, sweeps, precision."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from omegaconf import OmegaConf

from atlas_lm.checkpoints.io import AtomicCheckpointIO, SaveError
from atlas_lm.checkpoints.listing import why_unusable
from atlas_lm.training.module import AtlasModule
from atlas_lm.training.trainer import resolve_precision
from callbacks.rank_agreement import RanksDiverged
from tests.support.launching import files_no_larger_than, finished_run, report_of, small_run

pytestmark = [
    pytest.mark.usefixtures("in_tmp"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same(ours: Path, theirs: Path) -> None:
    """Weights and optimizer state of two checkpoints are bitwise equal."""
    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name in a["state_dict"]:
        assert torch.equal(a["state_dict"][name], b["state_dict"][name]), name
    moments_a, moments_b = (ck["optimizer_states"][0]["state"] for ck in (a, b))
    for i in moments_a:
        for name, value in moments_a[i].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments_b[i][name])), (i, name)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be read only."""
    return finished_run(tmp_path_factory.mktemp("first"), "name=first", "optim.total_steps=2")


@pytest.fixture
def finished(first: Path, in_tmp: Path) -> Path:
    """The checkpoint of a finished run below the working directory."""
    shutil.copytree(first.parents[1], in_tmp / "outputs", symlinks=True)
    return run_of(in_tmp, "first") / "checkpoints" / "last.ckpt"


def run_of(in_tmp: Path, name: str) -> Path:
    """The run folder of an experiment that ran once."""
    return next((in_tmp / "outputs" / name).glob("2*"))


def press_ctrl_c_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training_step = AtlasModule.training_step

    def pressed(self: Any, batch: Any, index: int) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, batch, index)

    monkeypatch.setattr(AtlasModule, "training_step", pressed)


def test_ctrl_c_then_resume_is_bitwise_the_uninterrupted_run(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small_run(in_tmp, "name=whole") == 0
    with monkeypatch.context() as patched:
        press_ctrl_c_at(1, patched)
        assert small_run(in_tmp, "name=cut") == 1
    run = run_of(in_tmp, "cut")
    found, printed = report_of(run), capsys.readouterr().out
    assert (found["status"], found["steps"]) == ("interrupted", 2)
    saved = run / "checkpoints" / "interrupted.ckpt"
    assert f"resume={saved}" in printed
    assert not (in_tmp / "outputs" / "cut" / "latest").exists()

    # Another seed: nothing but the checkpoint can make the rest equal.
    assert small_run(in_tmp, "name=resumed", f"resume={saved}", "seed=1") == 0
    resumed, whole = (run_of(in_tmp, name) for name in ("resumed", "whole"))
    assert_same(resumed / "checkpoints" / "last.ckpt", whole / "checkpoints" / "last.ckpt")
    assert report_of(resumed)["val_loss"] == report_of(whole)["val_loss"]
    assert report_of(resumed)["tokens"] == report_of(whole)["tokens"], "tokens count over the interruption"


def test_the_same_seed_gives_the_same_run_and_another_another(in_tmp: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert small_run(in_tmp, f"name={name}", f"seed={seed}", "optim.total_steps=2") == 0
    a, b, c = (run_of(in_tmp, name) / "checkpoints" / "last.ckpt" for name in "abc")
    assert_same(a, b)
    assert any(not torch.equal(weights(a)[name], weights(c)[name]) for name in weights(a))


def test_a_full_disk_while_saving(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def fills_up(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step-"):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fills_up)
    assert small_run(in_tmp, "name=x", "callbacks.step_checkpoint.every_n_steps=1", "~callbacks.spike_rollback") == 1
    captured = capsys.readouterr()
    line = next(line for line in captured.err.splitlines() if line.startswith("error"))
    folder = run_of(in_tmp, "x") / "checkpoints"
    assert f"cannot save '{folder / 'step-0000002.ckpt'}' (No space left on device): free space" in line
    assert "resume=" in line
    names = {path.name for path in folder.iterdir()}
    assert {"last.ckpt", "manifest.json", "step-0000001.ckpt"} <= names
    # training learns of it one step later at the latest, and may have saved that step
    assert names <= {"last.ckpt", "manifest.json", "step-0000001.ckpt", "step-0000003.ckpt"}
    assert all(why_unusable(path) is None for path in folder.glob("*.ckpt"))
    assert weights(folder / "last.ckpt")
    assert report_of(folder.parent)["status"] == "failed"
    assert SaveError.__name__ in report_of(folder.parent)["error"]
    assert "Traceback" not in captured.err
    assert "Traceback" not in captured.out


def test_a_disk_that_is_really_full(finished: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writing fails in the kernel, in the middle of the file, and not in a function of ours."""
    before = finished.read_bytes()
    with files_no_larger_than(len(before) // 2):
        assert small_run(in_tmp, "name=y", "optim.total_steps=4", f"resume={finished}") == 1
    captured = capsys.readouterr()
    line = next(line for line in captured.err.splitlines() if line.startswith("error"))
    assert "cannot save" in line
    assert "File too large" in line
    assert finished.read_bytes() == before
    assert list((run_of(in_tmp, "y") / "checkpoints").iterdir()) == []
    assert "Traceback" not in captured.err + captured.out


def error_of(capsys: pytest.CaptureFixture[str], code: int) -> str:
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert code == 1
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    return errors[0]


def test_a_checkpoint_of_another_architecture(finished: Path, in_tmp: Path, capsys: Any) -> None:
    for way, words in (("resume", "model.dim=32 but 16"), ("init_from", "model.dim=32 but 16")):
        assert words in error_of(capsys, small_run(in_tmp, f"name={way}", f"{way}={finished}", "model.dim=32"))
    assert "model.window=9 but 8" in error_of(
        capsys, small_run(in_tmp, "name=third", f"resume={finished}", "model.window=9")
    )


def test_a_truncated_checkpoint(finished: Path, in_tmp: Path, capsys: Any) -> None:
    finished.resolve().write_bytes(finished.read_bytes()[:5000])
    assert "is damaged, it has 5000 bytes instead of" in error_of(
        capsys, small_run(in_tmp, "name=second", f"resume={finished}")
    )


def test_a_missing_checkpoint(finished: Path, in_tmp: Path, capsys: Any) -> None:
    line = error_of(capsys, small_run(in_tmp, "name=second", f"resume={finished.with_name('lats.ckpt')}"))
    assert "did you mean 'last.ckpt'" in line
    assert "no run 'frist' (did you mean 'first'?)" in error_of(
        capsys, small_run(in_tmp, "name=third", "init_from=frist")
    )


def test_init_takes_the_weights_and_starts_again(finished: Path, in_tmp: Path, capsys: Any) -> None:
    still = ["optim.total_steps=1", "optim.lr=0", "optim.muon_lr=0", "optim.memory_lr=0"]
    assert small_run(in_tmp, "name=second", "init_from=first", *still) == 0
    second = run_of(in_tmp, "second") / "checkpoints" / "last.ckpt"
    assert torch.load(second, weights_only=True)["global_step"] == 1
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(second)[name])


@pytest.mark.long
def test_init_from_means_the_newest_finished_run_of_the_same_model(in_tmp: Path, capsys: Any) -> None:
    for name, changes in (("a", []), ("b", ["model.memory_hidden=9"])):  # b is newer, and another model
        assert small_run(in_tmp, "name=first", f"hydra.run.dir=outputs/first/2024_{name}", *changes) == 0
    assert small_run(in_tmp, "name=second", "init_from=first", "model.local_chunks=[2]", "optim.total_steps=1") == 0
    assert "2024_a" in (run_of(in_tmp, "second") / "train.log").read_text()
    line = error_of(capsys, small_run(in_tmp, "name=third", "init_from=first", "model.dim=8"))
    assert "no finished run of this model" in line
    assert "model.dim=8 but 16" in line
    line = error_of(capsys, small_run(in_tmp, "name=fourth", "init_from=stage1"))
    assert "train one first: python train.py +experiment=stage1 model=tiny" in line


def test_a_resumed_run_needs_no_start(finished: Path, in_tmp: Path) -> None:
    """+experiment=stage2 names a start in its configuration; with resume= it is what the run once began with."""
    assert small_run(in_tmp, "name=third", "init_from=nothing", f"resume={finished}", "optim.total_steps=6") == 0
    assert report_of(run_of(in_tmp, "third"))["steps"] == 6


def test_a_run_folder_is_never_used_twice(finished: Path, in_tmp: Path, capsys: Any) -> None:
    before = report_of(finished.parents[1])
    code = small_run(in_tmp, f"hydra.run.dir={finished.parents[1]}")
    assert "already holds a run" in error_of(capsys, code)
    assert report_of(finished.parents[1]) == before


def test_a_sweep_writes_a_folder_per_run(in_tmp: Path) -> None:
    sweep = ["name=s", "hydra.mode=MULTIRUN", "model.local_chunks=[4],[8]", "optim.total_steps=1"]
    assert small_run(in_tmp, *sweep) == 0
    runs = sorted(path for path in (in_tmp / "outputs" / "s").iterdir() if path.name != "latest")
    assert [OmegaConf.load(run / "config.yaml").model.local_chunks for run in runs] == [[4], [8]]
    assert (in_tmp / "outputs" / "s" / "latest").resolve() == runs[-1].resolve()


def test_the_checkpoints_of_a_run_are_written_by_the_atomic_plugin(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    save = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(
        AtomicCheckpointIO, "save_checkpoint", lambda self, *a, **k: (written.append(a[1]), save(self, *a, **k))[1]
    )
    assert small_run(in_tmp, "optim.total_steps=1") == 0
    assert [Path(path).name for path in written] == ["snapshot-0000000.ckpt", "step-0000001.ckpt"]


def test_the_saved_configuration_is_resolved_and_complete(first: Path) -> None:
    saved = OmegaConf.load(first / "config.yaml")
    assert "${" not in OmegaConf.to_yaml(saved)
    assert saved.model.dim == 16
    assert saved.trainer.max_steps == 2
    assert saved.paths.run == str(first)


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision(fast: bool, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: fast)
    with caplog.at_level("INFO"):
        assert resolve_precision("auto", "cpu") == chosen
    assert f"precision: {chosen}" in caplog.text
    assert resolve_precision("32-true", "cpu") == "32-true"


def test_the_verdict_names_the_cause_that_a_safeguard_found(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning tells its callbacks of the error that it met; what `fit` raises in the end may know better."""
    fit = lightning.Trainer.fit

    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            fit(self, *args, **kwargs)
        except RuntimeError as error:
            raise RanksDiverged("rank 1 is silent") from error

    def breaks(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(lightning.Trainer, "fit", fails)
    monkeypatch.setattr(AtlasModule, "training_step", breaks)
    assert small_run(in_tmp, "name=x") == 1
    report = report_of(run_of(in_tmp, "x"))
    assert report["status"] == "failed"
    assert report["error"] == "RanksDiverged: rank 1 is silent"
