"""Bad input: one clear line on stderr that names the value and the remedy, exit code 1, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from atlas_lm.cli import errors as cli
from atlas_lm.cli.submitting import BeforeJobs
from atlas_lm.config.validate import find_target
from tests.support import ROOT
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, launch, small_run, write_corpus

pytestmark = pytest.mark.usefixtures("in_tmp")


def fails(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The error line of a run that must fail."""
    assert launch(*overrides) == 1
    return error_line(capsys)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    return errors[0]


# What the command line and conf/ can get wrong, found before anything is built


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+experiment=stge1"], ["+experiment=stge1", "did you mean 'stage1'", "recall, recall_twin, stage1"]),
        (["experiment=stage1"], ["Use +experiment=stage1"]),
        (["model=tinny"], ["model=tinny", "did you mean 'tiny'"]),
        (["optim=adam"], ["optim=adam", "did you mean 'adamw'"]),
        (["modle=tiny"], ["modle", "did you mean 'model'"]),
        (["model.dimm=64"], ["model.dimm", "did you mean 'dim'"]),
        (["+model.dimm=64"], ["dimm", "did you mean 'dim'"]),
        (["+modle.dim=64"], ["modle", "did you mean 'model'"]),
        (["optim.learning_rate=1"], ["optim.learning_rate", "there are name, lr"]),
        (["trainer.max_stepz=1"], ["trainer.max_stepz", "did you mean 'max_steps'"]),
        (["trainer.benchmark=true"], ["trainer.benchmark", "+trainer.benchmark=<value> adds it"]),
        (["callbacks.step_checkpoint.kep=1"], ["callbacks.step_checkpoint.kep", "did you mean 'keep'"]),
        (["+trainer.max_stepz=1"], ["trainer.max_stepz", "Trainer", "did you mean 'max_steps'"]),
        (["data.source.tokeniser=bytes"], ["data.source.tokeniser", "did you mean 'tokenizer'"]),
        (["+data.batchsize=1"], ["data.batchsize", "TokenDataModule", "did you mean 'batch_size'"]),
        (["+callbacks.step_chekpoint.keep=3"], ["step_chekpoint", "no _target_", "did you mean 'step_checkpoint'"]),
        (["callbacks.progress=null"], ["callbacks.progress", "no _target_", "~callbacks.progress"]),
        (["~callbacks.progess"], ["callbacks.progess", "does not exist"]),
        (["data=text"], ["data.source.files is required"]),
        (["model.local_chunks=[1000000000]"], ["a chunk of 1000000000 tokens", "model.shard=256", "lower it"]),
        (["model.dim=wide"], ["model.dim", "'wide'", "correct the value"]),
        (["model.dim=0"], ["model.dim=0", "at least 1"]),
        (["optim.min_lr_ratio=1.5"], ["optim.min_lr_ratio=1.5", "at most 1"]),
        (["optim.lr=nan"], ["optim.lr=nan"]),
        (["model.fusion=multiplicativ"], ["model.fusion", "did you mean 'multiplicative'"]),
        (["precision=fp16"], ["precision=fp16", "auto, 32-true, bf16-mixed"]),
        (["seed=-1"], ["seed=-1", "at least 0"]),
        (["model.local_chunks=[8"], ["model.local_chunks=[8", "quotes"]),
        (["model.local_chunks=[8],[16]"], ["-m"]),
        (["paths.run=${nothing.here}"], ["nothing"]),
        (["data._target_=atlas_lm.data.datamodul.X"], ["data._target_", "no module"]),
        (["data._target_=atlas_lm.data.datamodule.TokenDataModul"], ["did you mean 'TokenDataModule'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_names_and_values(capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]) -> None:
    line = fails(capsys, *overrides)
    for word in words:
        assert word in line


def test_misspelled_keys_in_an_experiment_file(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = in_tmp / "mine" / "experiment"
    folder.mkdir(parents=True)
    for name, content, words in [
        ("a", "model: {dimm: 3}", ["model.dimm", "did you mean 'dim'", "(in conf/experiment/a.yaml)"]),
        ("b", "trainer: {max_stepz: 3}", ["trainer.max_stepz", "did you mean 'max_steps'"]),
        ("c", "callbacks: {step_chekpoint: {keep: 3}}", ["callbacks.step_chekpoint", "did you mean 'step_checkpoint'"]),
        ("d", "modle: {dim: 3}", ["modle", "did you mean 'model'"]),
        ("e", "model: {dim: 3", ["broken YAML", "e.yaml"]),
    ]:
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{content}\n")
        line = fails(capsys, f"hydra.searchpath=[file://{in_tmp}/mine]", f"+experiment={name}")
        for word in words:
            assert word in line


def test_misspelled_target_arguments_name_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "+data.source.nothing_like_it=1")
    assert "StdlibSource" in line
    assert "it takes tokenizer, validation_fraction" in line


# What the data and the machine can get wrong


def test_empty_corpus(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "empty.txt").write_text("")
    line = fails(capsys, "data=text", "data.source.files=[empty.txt]")
    assert "found no text: every document is empty" in line


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "data=text", "data.source.files=[nowhere/*.txt]")
    assert "nothing matches 'nowhere/*.txt'" in line


def test_broken_jsonl_line_is_named_by_number(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"\n')
    assert "a.jsonl:2" in fails(capsys, "data=text", "data.source.files=[a.jsonl]")


def test_gpu_where_there_is_none(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert small_run(in_tmp, "trainer=gpu") == 1
    assert "use trainer=cpu" in error_line(capsys)


def test_shard_that_is_no_multiple_of_the_global_chunk(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run(in_tmp, "model.shard=15") == 1
    line = error_line(capsys)
    assert "15" in line
    assert "multiple" in line


def test_sequence_shorter_than_two_global_chunks_warns(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_gradients = ["model.update=gradient", "optim.total_steps=1"]  # delta reads at every token
    assert small_run(in_tmp, "model.global_chunk=16", *by_gradients) == 0
    assert "the global memory is never read" not in capsys.readouterr().err
    assert small_run(in_tmp, "name=other", "model.global_chunk=32", "model.shard=32", *by_gradients) == 0
    warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warning) == 1
    assert "data.seq_len=32 is shorter than two global chunks of 32" in warning[0]


def test_a_sweep_over_ranks_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_ranks = ["trainer.devices=2", "trainer.strategy=ddp", "hydra.mode=MULTIRUN"]
    assert small_run(in_tmp, *two_ranks) == 1
    captured = capsys.readouterr().err
    assert "error: -m cannot be combined with 2 ranks" in captured
    assert "trainer.devices=1" in captured


def test_a_sweep_names_every_run_that_failed(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data=text", write_corpus(in_tmp / "c"), *SMALL_MODEL, *SMALL_DATA, *FEW_STEPS]
    assert launch(*overrides, "hydra.mode=MULTIRUN", "model.shard=15,16,17", "optim.total_steps=1") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert [next(s for s in ("=15", "=17") if s in line) for line in lines[:2]] == ["=15", "=17"]
    assert len(lines) == 3
    finished = list(in_tmp.glob("outputs/default/*/report.json"))
    assert len({path.resolve() for path in finished}) == 1


# Jobs of SLURM


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=-1"], "error: optim.lr=-1.0 must be at least 0"),
        (["model.layers=0", "optim.lr=1e-3,2e-3"], "error: model.layers=0 must be at least 1"),
        (["trainer=ddp"], "error: trainer.devices=auto: a job is given its tasks before it sees a node"),
    ],
)
def test_what_all_jobs_would_refuse_is_not_submitted(
    in_tmp: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert launch("+experiment=stage1", "launcher=slurm", "hydra.mode=MULTIRUN", *words) == 1
    captured = capfd.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert "squeue" not in captured.out
    assert not (in_tmp / "outputs").exists()


@pytest.mark.parametrize("setup", [["module load cuda"], None])
def test_a_setup_that_queues_nothing_again_is_said(setup: list[str] | None, capsys: pytest.CaptureFixture[str]) -> None:
    """A list replaces a list, so a `launcher=mine` with lines of its own had lost those of ours, and nobody knew."""
    pytest.importorskip("submitit")
    words = ["+experiment=stage1", "launcher=slurm"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", overrides=words, return_hydra_config=True)
    OmegaConf.update(cfg, "hydra.launcher.submitit_folder", "o/%j")
    if setup is not None:
        OmegaConf.update(cfg, "hydra.launcher.setup", setup)
    BeforeJobs().on_multirun_start(cfg)
    captured = capsys.readouterr()
    assert ("has no line that queues a killed process again" in captured.err) == (setup is not None)
    assert "o/<job>/ has what they print" in captured.out


def test_what_submitit_says_of_a_job_is_one_line() -> None:
    utils = pytest.importorskip("submitit.core.utils")
    trace = "Traceback (most recent call last):\n  File x\nValueError: 'o/1' is the run of job 3: scancel 3\n"
    line = "-" * 22
    said = cli.explain(utils.FailedJobError(
        f"Job (task=0) failed during processing with trace:\n{line}\n{trace}\n{line}\nYou can check full logs with "
        "'job.stderr(0)' and 'job.stdout(0)'or at paths:\n  - o/.slurm/3/3_0_log.out\n  - o/.slurm/3/3_0_log.out"
    ))  # fmt: skip
    assert said == "ValueError: 'o/1' is the run of job 3: scancel 3 (in a job; all of it is in o/.slurm/3/3_0_log.out)"
    left = f"Job 3 (task: 0) has not produced any output (state: CANCELLED)\nError stream produced:\n{'-' * 40}\nx\ny"
    said = cli.explain(utils.UncompletedJobError(left))
    assert said is not None
    assert "state: CANCELLED" in said
    assert "\n" not in said


def test_a_machine_without_slurm(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(in_tmp))
    assert launch("+experiment=stage1", "launcher=slurm", "hydra.mode=MULTIRUN") == 1
    captured = capfd.readouterr()
    assert "error: launcher=slurm: there is no SLURM on this machine" in captured.err
    assert "Traceback" not in captured.err


# What is no user's mistake


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def buggy() -> None:
        raise AttributeError("a bug")

    with pytest.raises(AttributeError, match="a bug"):
        cli.run(buggy)
    with pytest.raises(ValueError, match="invalid literal"):  # raised here, outside our packages
        cli.run(lambda: int("x"))
    assert "error:" not in capsys.readouterr().err


def test_full_errors_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="stge1"):
        launch("+experiment=stge1")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_missing_dependency_is_not_taken_for_a_misspelling(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "needs_something.py").write_text("import not_installed_at_all\n\nclass C: ...\n")
    monkeypatch.syspath_prepend(str(in_tmp))
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        find_target("needs_something.C", "data")


@pytest.mark.long
def test_a_process_is_left_without_taking_the_interpreter_apart(tmp_path: Path) -> None:
    """What is to be written at the end is written; an abort while Python ends changes no exit code."""
    script = """
import atexit, os, sys, threading, time
from atlas_lm.cli.errors import leave
class Aborts:
    def __del__(self, abort=os.abort): abort()
kept = Aborts()
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("end", end=" ")
{end}
"""
    ended = {}
    for name, end in (("leave", "leave(3)"), ("exit", "sys.exit(3)")):
        lines = script.replace("{end}", end)
        if name == "exit":  # seconds of imports less
            lines = lines.replace("from atlas_lm.cli.errors import leave", "")
        command = [sys.executable, "-c", lines]
        ended[name] = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended["leave"].returncode == 3
    assert ended["leave"].stdout.split() == ["end", "thread", "at", "exit"]
    assert ended["exit"].returncode == -signal.SIGABRT, "the abort is a real one"
