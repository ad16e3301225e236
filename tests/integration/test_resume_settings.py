"""docs/resume-and-clusters.md, the table of settings: every row is changed here at a resume, and judged as it says."""

import fnmatch
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

import train
from atlas_lm.checkpoints.io import AtomicCheckpointIO
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.training.module import AtlasModule
from callbacks.gate_monitor import GateMonitor
from callbacks.loss_weight_schedule import LossWeightSchedule
from callbacks.spike_rollback import SpikeRollback
from tests.support import ROOT
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, launch, only_run, report_of, write_corpus

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

DONE, STEPS = 4, 8  # when the run is interrupted, and in all
SETTINGS = [
    "name=x", "optim=muon", "precision=32-true", *SMALL_MODEL, "model.dim=32", "model.head_dim=16", *SMALL_DATA,
    *FEW_STEPS, "data.seq_len=48", f"optim.total_steps={STEPS}", "callbacks.outlier_guard.warm_up=2",
]  # fmt: skip


class Resumed(NamedTuple):
    """A run after it was resumed with one setting changed, beside the same one resumed without a change."""

    run: Path
    trainer: lightning.Trainer
    unchanged: Path

    def groups(self) -> list[dict[str, Any]]:
        return self.checkpoint()["optimizer_states"][0]["param_groups"]

    def checkpoint(self, run: Path | None = None) -> dict[str, Any]:
        return torch.load((run or self.run) / "checkpoints" / "last.ckpt", weights_only=True)

    def rates(self) -> list[float]:
        """`optim/lr` of the resumed steps."""
        return [row["optim/lr"] for row in read_rows(self.run / "metrics.jsonl") if row.get("optim/lr")][DONE:]

    def same_weights(self) -> bool:
        ours, theirs = self.checkpoint()["state_dict"], self.checkpoint(self.unchanged)["state_dict"]
        return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def moved_on(outputs: Path, name: str) -> bool:
    """A run of its own has done the rest of the steps, with the records of these alone."""
    run = only_run(outputs, name)
    return [row["step"] for row in read_rows(run / "metrics.jsonl") if row.get("train/loss")] == [*range(DONE, STEPS)]


def recorded(r: Resumed, name: str) -> list[int]:
    return [row["step"] for row in read_rows(r.run / "metrics.jsonl") if row.get(name) is not None]


Check = Callable[[Resumed], Any]
CHANGES: dict[str, tuple[str, Check | None]] = {
    "name": ("name=y", lambda r: moved_on(r.run.parents[1], "y")),
    "seed": ("seed=7", None),
    "precision": (
        "precision=bf16-mixed",
        lambda r: report_of(r.run)["precision"] == "bf16-mixed" and not r.same_weights(),
    ),
    "resume": ("resume=auto", Resumed.same_weights),
    "init_from": ("init_from=nothing_that_exists", None),
    "model.name": ("model.name=other", lambda r: r.checkpoint()["hyper_parameters"]["model"]["name"] == "other"),
    "model.*": ("model.window=9", None),
    "optim.name": ("optim.name=adamw", None),
    "optim.lr": (
        "optim.lr=1e-5",
        lambda r: {g["initial_lr"] for g in r.groups()} == {1e-5, 1e-4, 0.02} and max(r.rates()) <= 1e-5,
    ),
    "optim.muon_lr": ("optim.muon_lr=0.5", lambda r: r.groups()[0]["initial_lr"] == 0.5 and r.groups()[0]["lr"] > 0.02),
    "optim.memory_lr": (
        "optim.memory_lr=0.5",
        lambda r: r.groups()[2]["initial_lr"] == 0.5 and r.groups()[2]["lr"] > 0.02,
    ),
    "optim.weight_decay": (
        "optim.weight_decay=0.7",
        lambda r: [g["weight_decay"] for g in r.groups()] == [0.7, 0.7, 0, 0],
    ),
    "optim.betas": ("optim.betas=[0.5,0.6]", lambda r: [tuple(g["betas"]) for g in r.groups()[1:]] == [(0.5, 0.6)] * 3),
    "optim.warmup_steps": (
        "optim.warmup_steps=8",
        lambda r: r.rates() == pytest.approx([1e-3 * (i + 1) / 8 for i in range(4, 8)]),
    ),
    "optim.total_steps": ("optim.total_steps=10", lambda r: report_of(r.run)["steps"] == 10),
    "optim.min_lr_ratio": ("optim.min_lr_ratio=1", lambda r: r.rates() == pytest.approx([1e-3] * (STEPS - DONE))),
    "optim.clip": ("optim.clip=1e-9", lambda r: r.trainer.gradient_clip_val == 1e-9 and not r.same_weights()),
    "data.source.*": ("data.source.validation_fraction=0.5", None),
    "data.seq_len": ("data.seq_len=32", None),
    "data.batch_size": ("data.batch_size=1", None),
    "data.seed": ("data.seed=1", None),
    "data.num_workers": (
        "data.num_workers=1",
        lambda r: r.trainer.train_dataloader.num_workers == 1 and r.same_weights(),
    ),
    "data.val_batch_size": ("data.val_batch_size=1", lambda r: r.trainer.val_dataloaders.batch_size == 1),
    "data.val_sequences": (
        "data.val_sequences=2",
        lambda r: report_of(r.run)["val_bytes"] < report_of(r.unchanged)["val_bytes"],
    ),
    "data.test_sequences": ("data.test_sequences=1", lambda r: len(r.trainer.datamodule.held_out_indices("test")) == 1),
    "trainer.max_epochs": ("trainer.max_epochs=0", lambda r: r.trainer.global_step == DONE),
    "trainer.max_steps": ("trainer.max_steps=6", lambda r: report_of(r.run)["steps"] == 6),
    "trainer.gradient_clip_val": ("trainer.gradient_clip_val=1e-9", lambda r: not r.same_weights()),
    "trainer.accumulate_grad_batches": (
        "trainer.accumulate_grad_batches=2",
        lambda r: report_of(r.run)["tokens"] == 2 * 48 * (DONE + 2 * (STEPS - DONE)),
    ),
    "trainer.val_check_interval": ("trainer.val_check_interval=3", lambda r: recorded(r, "val/loss") == [3, 5, 8]),
    "trainer.check_val_every_n_epoch": (
        "trainer.check_val_every_n_epoch=1",
        lambda r: r.trainer.check_val_every_n_epoch == 1,
    ),
    "trainer.num_sanity_val_steps": ("trainer.num_sanity_val_steps=3", None),
    "trainer.log_every_n_steps": (
        "trainer.log_every_n_steps=2",
        lambda r: recorded(r, "train/loss") == [0, 1, 2, 3, 5, 7],
    ),
    "trainer.enable_model_summary": (
        "trainer.enable_model_summary=true",
        lambda r: any("ModelSummary" in type(c).__name__ for c in r.trainer.callbacks),
    ),
    "trainer.enable_checkpointing": ("trainer.enable_checkpointing=false", None),
    "trainer.use_distributed_sampler": ("trainer.use_distributed_sampler=true", None),
    "trainer.default_root_dir": (
        "trainer.default_root_dir=elsewhere",
        lambda r: Path(r.trainer.default_root_dir).name == "elsewhere",
    ),
    "trainer.plugins": (
        "trainer.plugins=[]",
        lambda r: (
            not r.trainer.strategy._checkpoint_io or "Atomic" not in type(r.trainer.strategy.checkpoint_io).__name__
        ),
    ),
    "logger.*": ("~logger.jsonl", lambda r: len(read_rows(r.run / "metrics.jsonl")) == DONE),
    "callbacks.*": (
        "callbacks.step_checkpoint.every_n_steps=1",
        lambda r: (r.run / "checkpoints" / "step-0000007.ckpt").exists(),
    ),
    "paths.outputs": ("paths.outputs=others", lambda r: moved_on(Path("others"), "x")),
}


def row_of(setting: str, rows: dict[str, str]) -> str | None:
    """The row that speaks of a setting: the first that matches."""
    return next((row for row in rows if fnmatch.fnmatchcase(setting, row) or setting.startswith(f"{row}.")), None)


def table() -> dict[str, str]:
    """setting → applies | refused | ignored by nature, as the documentation has it."""
    text = (ROOT / "docs" / "resume-and-clusters.md").read_text()
    return dict(re.findall(r"^\| `([^`]+)` \| (applies|refused|ignored by nature) \|", text, re.MULTILINE))


def settings_of(config: Any, where: str = "") -> Iterator[str]:
    """Dotted names of all values; those of a list or of what may be anything by the name of the whole."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from settings_of(value, f"{where}{key}.")
        elif key != "_target_":
            yield f"{where}{key}"


def test_every_setting_has_a_row_and_every_row_a_test() -> None:
    rows = table()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides in (
            [],
            ["data=text", "data.source.files=x", "callbacks=stage2"],
            ["data=recall"],
            ["trainer=fsdp"],
        ):
            composed = OmegaConf.to_container(compose("train", overrides), resolve=False)
            missing = [name for name in settings_of(composed) if row_of(name, rows) is None]
            assert missing == []
    assert {*CHANGES, *BY_ITSELF} == {*rows}
    for row in rows:  # a row of a group would hide those below it
        assert row_of(row, rows) == row


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run that was interrupted, the same one resumed without a change, and the override that names their corpus."""
    home = tmp_path_factory.mktemp("resumed")
    corpus = write_corpus(home / "corpus")
    step = AtlasModule.training_step
    seen: list[int] = []

    def interrupted(self: Any, batch: Any, index: int) -> Any:
        seen.append(index)
        if len(seen) == DONE:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        (home / "cut").mkdir()
        patch.chdir(home / "cut")
        patch.setattr(AtlasModule, "training_step", interrupted)
        assert launch("data=text", corpus, *SETTINGS) == 75
        shutil.copytree(home / "cut", home / "unchanged")
        patch.chdir(home / "unchanged")
        assert resume(corpus) == 0
    return only_run(home / "cut" / "outputs"), only_run(home / "unchanged" / "outputs"), corpus


def resume(corpus: str, *changes: str) -> int:
    """Resume the run below the working directory."""
    run = only_run(Path("outputs"), "x")
    return launch("data=text", corpus, *SETTINGS, f"resume={run}", *changes)


@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_that_is_changed_at_a_resume(
    setting: str, folders: tuple[Path, Path, str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cut, unchanged, corpus = folders
    shutil.copytree(cut.parents[1], in_tmp / "outputs")
    run = only_run(in_tmp / "outputs")
    built: list[lightning.Trainer] = []
    build = train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda *args: built.append(build(*args)) or built[-1])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".log"}
    capsys.readouterr()
    change, check = CHANGES[setting]
    code, verdict = resume(corpus, change), table()[setting]
    if verdict == "refused":
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code == 1
        assert len(errors) == 1
        named = "corpus" if setting == "data.source.*" else change.partition("=")[0].rpartition(".")[2]
        assert named in errors[0]
        kept = {path: content for path, content in before.items() if ".hydra" not in path.parts}
        assert {path: path.read_bytes() for path in kept} == kept
        return
    assert code == 0
    resumed = Resumed(run, built[-1], unchanged)
    if verdict == "ignored by nature":
        assert check is None
        assert resumed.same_weights()
        assert report_of(run)["val_loss"] == report_of(unchanged)["val_loss"]
    else:
        assert check is not None
        assert check(resumed)


def test_no_state_of_a_callback_holds_a_setting(in_tmp: Path) -> None:
    """What a callback has saved must not come back in place of what it is configured with now."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["callbacks=stage2", "paths.run=x"])
    for name, entry in config.callbacks.items():
        first, second = instantiate(entry), instantiate(entry)
        settings = [key for key in inspect.signature(type(second)).parameters if hasattr(second, key)]
        state = first.state_dict()
        assert not {*settings} & {*state}, name
        marks = {key: object() for key in settings if not isinstance(getattr(type(second), key, None), property)}
        for key, mark in marks.items():
            setattr(second, key, mark)
        if state:
            second.load_state_dict(json.loads(json.dumps(state)) if name != "weight_integrity" else state)
        assert {key: getattr(second, key) for key in marks} == marks, name


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_groups_of_batches_begin_at_a_resume_or_are_refused(
    folders: tuple[Path, Path, str], in_tmp: Path, capsys: pytest.CaptureFixture[str], batches: int
) -> None:
    """Four batches are done."""
    shutil.copytree(folders[0].parents[1], in_tmp / "outputs")
    assert resume(folders[2], "trainer.accumulate_grad_batches=3") == 1
    assert "trainer.accumulate_grad_batches=3" in capsys.readouterr().err
    assert resume(folders[2], f"trainer.accumulate_grad_batches={batches}") == 0
    rows = read_rows(only_run(in_tmp / "outputs") / "metrics.jsonl")
    steps = [row["step"] for row in rows if row.get("train/loss") is not None]
    assert steps == [*range(STEPS)], "each once"


def test_one_file_of_a_sharding_strategy_is_refused_by_others(
    folders: tuple[Path, Path, str], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning numbers moments otherwise there. Shards know their names: tests/integration/test_elastic.py."""
    shutil.copytree(folders[0].parents[1], in_tmp / "outputs")
    path = only_run(in_tmp / "outputs") / "checkpoints" / "interrupted.ckpt"
    AtomicCheckpointIO().save_checkpoint({**torch.load(path, weights_only=True), "sharded": True}, path)
    capsys.readouterr()
    assert resume(folders[2]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "trainer.strategy" in errors[0]


def test_what_a_callback_has_averaged_is_not_compared_with_something_else() -> None:
    spikes, other = (SpikeRollback("x", watch=watch) for watch in ("held_out", "training_loss"))
    spikes.ema, spikes.ema_of = 9.0, "held_out 1 abc"
    other.load_state_dict(spikes.state_dict())
    assert other._what_is_measured(None) == "training_loss" != other.ema_of  # type: ignore[arg-type]
    weights, others = (LossWeightSchedule({"a": 1.0}, 9, watch=watch) for watch in ("train/loss", "val/loss"))
    weights.judge(2.0, 1)
    others.load_state_dict(weights.state_dict())
    assert (others.average, others.best) == (None, None)
    gates, later = GateMonitor(100, 1000), GateMonitor(500, 1000)
    gates.baseline, gates.taken_at = [0.01], 100
    later.load_state_dict(gates.state_dict())
    failure = later.judge(1000, [0.011])
    assert failure is not None
    assert "since step 100" in failure.message


@pytest.mark.parametrize(("of", "is_one"), [("training_loss", False), ("", True)], ids=["of something else", "unknown"])
def test_another_thing_to_watch_is_no_spike(
    folders: tuple[Path, Path, str], in_tmp: Path, capsys: pytest.CaptureFixture[str], of: str, is_one: bool
) -> None:
    """Held-out perplexity lies far above an average of what a model has learned by heart."""
    shutil.copytree(folders[0].parents[1], in_tmp / "outputs")
    path = only_run(in_tmp / "outputs") / "checkpoints" / "interrupted.ckpt"
    content = torch.load(path, weights_only=True)
    content["callbacks"]["SpikeRollback"] |= {"ema": 1.01, "ema_of": of}
    AtomicCheckpointIO().save_checkpoint(content, path)
    assert resume(folders[2]) == 0
    assert ("above its average, where this run is resumed" in capsys.readouterr().err) == is_one


# Not in this process


def in_processes(folder: Path, corpus: str, *changes: str, torchrun: bool = False) -> list[int]:
    """Exit codes of a resume in processes of its own."""
    run = only_run(folder / "outputs", "x")
    words = [str(ROOT / "train.py"), "data=text", corpus, *SETTINGS, f"resume={run}", *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, *words]]
    if torchrun:
        port = 20000 + os.getpid() % 20000
        common = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                  "--master-addr=127.0.0.1", f"--master-port={port}"]  # fmt: skip
        commands = [[*common, f"--node-rank={node}", *words] for node in (0, 1)]
    processes = [subprocess.Popen(command, cwd=folder, env=environment) for command in commands]
    return [process.wait(timeout=200) for process in processes]


TWO = ["trainer.strategy=ddp", "data.batch_size=1"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [["trainer.devices=2", *TWO], ["trainer.num_nodes=2", *TWO]], ids=lambda c: c[0])
def test_ranks(folders: tuple[Path, Path, str], in_tmp: Path, changes: list[str]) -> None:
    """The same batches, in other parts: the losses agree up to rounding."""
    shutil.copytree(folders[0].parents[1], in_tmp / "outputs")
    assert {*in_processes(in_tmp, folders[2], *changes, torchrun="num_nodes" in changes[0])} == {0}
    ours, theirs = only_run(in_tmp / "outputs"), folders[1]
    a, b = (
        [row["train/loss"] for row in read_rows(run / "metrics.jsonl") if row.get("train/loss")]
        for run in (ours, theirs)
    )
    assert len(a) == len(b) == STEPS
    assert report_of(ours)["val_loss"] == pytest.approx(report_of(theirs)["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_ranks_of_another_global_batch_are_refused(folders: tuple[Path, Path, str], in_tmp: Path) -> None:
    shutil.copytree(folders[0].parents[1], in_tmp / "outputs")
    before = (only_run(in_tmp / "outputs") / "metrics.jsonl").read_bytes()
    assert in_processes(in_tmp, folders[2], "trainer.devices=2", "trainer.strategy=ddp") == [1]
    assert (only_run(in_tmp / "outputs") / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_settings_of_the_optimizer_apply_where_parameters_are_sharded(
    folders: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """Lightning loads the optimizer there before it asks the module. The last step is no validation step either."""
    fsdp = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.val_check_interval=3"]
    command = [sys.executable, str(ROOT / "train.py"), "data=text", folders[2], *SETTINGS, *fsdp]
    changes = ["optim.lr=1e-5", "optim.weight_decay=0.7", "optim.total_steps=8"]
    for more in (["optim.total_steps=4"], [*changes, "resume=x"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
        assert done.returncode == 0
    run = only_run(tmp_path / "outputs")
    groups = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-5, 1e-4, 0.02}
    assert {group["weight_decay"] for group in groups} == {0.7, 0.0}
    rates = [row["optim/lr"] for row in read_rows(run / "metrics.jsonl") if row.get("optim/lr")]
    assert max(rates[DONE:]) <= 1e-5 < min(rates[1:DONE])
    assert report_of(run)["validated_at_step"] == 8


@pytest.mark.long
def test_strategy(folders: tuple[Path, Path, str], in_tmp: Path) -> None:
    shutil.copytree(folders[0].parents[1], in_tmp / "outputs")
    assert in_processes(in_tmp, folders[2], "trainer.strategy=ddp") == [0]
    ours, theirs = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
                    for run in (only_run(in_tmp / "outputs"), folders[1]))  # fmt: skip
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_accelerator(folders: tuple[Path, Path, str], in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folders[0].parents[1], in_tmp / "outputs")
    if torch.cuda.is_available():
        assert resume(folders[2], "trainer.accelerator=gpu") == 0
    else:
        assert resume(folders[2], "trainer.accelerator=gpu") == 1
        assert "trainer.accelerator=gpu" in capsys.readouterr().err


BY_ITSELF = {  # rows with a test of their own, or that are another row by another name
    "trainer.accelerator": test_accelerator,
    "trainer.devices": test_ranks,
    "trainer.num_nodes": test_ranks,
    "trainer.strategy": test_strategy,
    "trainer.precision": "precision",
    "paths.run": "paths.outputs",
}
