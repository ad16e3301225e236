"""A run that ends in the middle and is resumed is bit for bit the uninterrupted one, and so are its records."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import atlas_lm.runs.lifecycle
import train
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.runs.folder import runs_in, write_identity
from atlas_lm.runs.lifecycle import archive_if_changed
from atlas_lm.runs.lock import locked
from atlas_lm.runs.report import judge
from atlas_lm.runs.resolve import run_folder, sweep_folder, unfinished_run
from atlas_lm.training.module import AtlasModule
from callbacks.random_state import set_states, states
from tests.support import ROOT
from tests.support.launching import (
    FEW_STEPS,
    SMALL_DATA,
    SMALL_MODEL,
    before_launch,
    finished_run,
    launch,
    only_run,
    report_of,
    small_run,
    write_corpus,
)
from tests.support.resuming import OFTEN, Killed, assert_same_run, die_at
from tests.support.worlds import KINDS, World

pytestmark = [
    pytest.mark.usefixtures("in_tmp"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

TRAIN = ROOT / "train.py"
WORLDS = ["as it was", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]


@pytest.fixture(autouse=True, params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """All of this holds whatever happens between two processes, see `worlds.py`."""
    now = World(request.param, monkeypatch, tmp_path)
    before_launch.append(now.begin)
    yield now
    before_launch.clear()
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    before, arguments = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["train.py"]
    try:
        assert small_run(folder, "name=whole", *OFTEN) == 0
    finally:
        os.chdir(before)
        sys.argv = arguments
    return only_run(folder / "outputs")


@pytest.fixture(scope="module")
def finished_x(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a finished run named x, to be copied."""
    return finished_run(tmp_path_factory.mktemp("x"), "name=x").parents[1]


@pytest.fixture
def x(finished_x: Path, in_tmp: Path, world: World) -> Path:
    """The folder of a finished run named x below the working directory."""
    if world.kind in KINDS:  # which happens between the process that trained it and those of the test
        assert small_run(in_tmp, "name=x") == 0
    else:
        shutil.copytree(finished_x, in_tmp / "outputs", symlinks=True)
    return only_run(in_tmp / "outputs")


IN_THE_FAST_SUITE = (2, 7)  # before any save, after a validation with a save


@pytest.mark.parametrize(
    "batch", [pytest.param(i, marks=[] if i in IN_THE_FAST_SUITE else pytest.mark.slow) for i in range(2, 25)]
)
def test_killed_in_any_step_and_resumed(whole: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        die_at(batch, patched, kill)
        with pytest.raises(Killed):
            small_run(in_tmp, "name=cut", *OFTEN)
    assert small_run(in_tmp, "name=cut", *OFTEN, "resume=auto", "seed=1") == 0, "only the checkpoint can tell the seed"
    assert_same_run(only_run(in_tmp / "outputs"), whole)


def test_ctrl_c_and_the_schedulers_signals(
    whole: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, code, batch in ((signal.SIGTERM, 75, 4), (signal.SIGUSR1, 75, 5), (signal.SIGINT, 1, 9)):
        with monkeypatch.context() as patched:
            die_at(batch, patched, lambda number=number: os.kill(os.getpid(), number))  # type: ignore[misc]
            assert small_run(in_tmp, "name=cut", *OFTEN, "resume=auto") == code
        run = only_run(in_tmp / "outputs")
        assert report_of(run)["status"] == "interrupted"
        assert f"resume={run}/checkpoints/interrupted.ckpt" in capsys.readouterr().out
        assert report_of(run)["checkpoint"] == f"{run}/checkpoints/interrupted.ckpt"
    assert report_of(run)["steps"] == 4 + 5 + 9, "each finished the step in which the signal came"
    assert small_run(in_tmp, "name=cut", *OFTEN, f"resume={run}/checkpoints/interrupted.ckpt") == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("validated", [True, False], ids=["validated at its last step", "validated after it"])
def test_a_run_that_dies_after_its_last_step_gets_its_verdict(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, validated: bool
) -> None:
    every = ["trainer.val_check_interval=4" if validated else "trainer.val_check_interval=3"]

    def kill(*_: Any) -> None:
        raise Killed

    assert small_run(in_tmp, "name=whole", *every) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train, "judge", kill)
        with pytest.raises(Killed):
            small_run(in_tmp, "name=cut", *every)
    assert small_run(in_tmp, "name=cut", *every, "resume=auto") == 0
    ours, theirs = (only_run(in_tmp / "outputs", name) for name in ("cut", "whole"))
    assert report_of(ours)["status"] == "finished"
    assert report_of(ours)["validated_at_step"] == 4
    assert_same_run(ours, theirs)
    assert small_run(in_tmp, "name=cut", *every, "resume=cut", "+trainer.limit_val_batches=1") == 0
    assert report_of(ours)["val_loss"] != report_of(theirs)["val_loss"], "other settings, a validation of their own"


@pytest.mark.slow
def test_a_run_with_a_rollback_resumes_on_its_timeline(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled_then_dead(batches: dict[int, Any]) -> int:
        step, seen = AtlasModule.training_step, []

        def trained(self: Any, data: Any, index: int) -> Any:
            seen.append(index)
            batches.get(len(seen), lambda module: None)(self)
            return step(self, data, index)

        with monkeypatch.context() as patched:
            patched.setattr(AtlasModule, "training_step", trained)
            return small_run(in_tmp, f"name={name}", *OFTEN, "resume=auto")

    def spoil(module: Any) -> None:
        module.model.norm.weight.data.mul_(30.0)

    def kill(module: Any) -> None:
        raise Killed

    name = "whole_of_it"
    assert spoiled_then_dead({7: spoil}) == 0
    name = "cut"
    with pytest.raises(Killed):
        spoiled_then_dead({7: spoil, 12: kill})
    assert spoiled_then_dead({}) == 0
    ours, theirs = (only_run(in_tmp / "outputs", run) for run in ("cut", "whole_of_it"))
    assert report_of(ours)["rollbacks"] == 1
    assert {row["timeline"] for row in read_rows(ours / "metrics.jsonl")} == {0, 1}
    assert_same_run(ours, theirs)


# Two processes, for real


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    corpus = write_corpus(folder / "corpus")
    for happen in before_launch:
        happen()
    command = [sys.executable, str(TRAIN), "data=text", corpus, *SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, *OFTEN]
    with (folder / "stderr").open("ab") as stderr:
        return subprocess.Popen(
            [*command, "trainer.devices=2", "trainer.strategy=ddp", "name=cut", *overrides],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip


def run_to_end(folder: Path, *overrides: str) -> int:
    return start(folder, *overrides).wait(timeout=300)


def rows_so_far(folder: Path) -> int:
    found = list(folder.glob("outputs/cut/2*/metrics.jsonl"))
    return len(found[0].read_bytes().splitlines()) if found else 0


@pytest.mark.slow
def test_two_ranks_killed_and_preempted(in_tmp: Path) -> None:
    (in_tmp / "whole").mkdir()
    (in_tmp / "cut").mkdir()
    assert run_to_end(in_tmp / "whole") == 0
    for number, after, code in ((signal.SIGKILL, 5, -9), (signal.SIGTERM, 12, 75)):
        process = start(in_tmp / "cut", "resume=auto")
        until = time.monotonic() + 120
        while rows_so_far(in_tmp / "cut") < after and time.monotonic() < until:
            time.sleep(0.01)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)  # to rank zero alone: the ranks end together
        assert process.wait(timeout=60) == code, (in_tmp / "cut" / "stderr").read_text()[-2000:]
    assert run_to_end(in_tmp / "cut", "resume=auto") == 0
    assert_same_run(*(only_run(in_tmp / name / "outputs") for name in ("cut", "whole")))


# Parts


def test_folders(in_tmp: Path) -> None:
    """Which folder a run gets."""

    def run(name: str, status: str | None, checkpoint: bool = True) -> Path:
        folder = in_tmp / "outputs" / "x" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text("name: x\n")
        write_identity(folder, [])
        if checkpoint:
            torch.save({"state_dict": {}}, folder / "checkpoints" / "a.ckpt")
        if status:
            (folder / "report.json").write_text(json.dumps({"status": status}))
        return folder

    outputs, experiment = str(in_tmp / "outputs"), in_tmp / "outputs" / "x"
    new = str(experiment / "new")
    assert run_folder(None, outputs, "x", "new") == new
    assert run_folder("auto", outputs, "x", "new") == new, "there is no run at all"
    first = run("9", None)  # names tell no order: clocks differ
    assert run_folder("auto", outputs, "x", "new") == str(first)
    assert run_folder("auto", outputs, "y", "new") == str(in_tmp / "outputs" / "y" / "new")
    for status in ("interrupted", "failed"):
        (first / "report.json").write_text(json.dumps({"status": status}))
        assert unfinished_run(experiment) == first
    (first / "report.json").write_text("{half")
    assert unfinished_run(experiment) == first
    second = run("2", "finished")
    assert unfinished_run(experiment) is None, "the newest counts alone"
    assert run_folder(str(second), outputs, "x", "new") == str(second.resolve())
    assert run_folder(str(second / "checkpoints" / "a.ckpt"), outputs, "x", "new") == str(second)
    assert run_folder(str(second), outputs, "other", "new") == str(in_tmp / "outputs" / "other" / "new")
    (second / "checkpoints" / "b.ckpt").write_text("half")
    assert run_folder(str(second / "checkpoints" / "a.ckpt"), outputs, "x", "new") == str(second), (
        "the newest intact one"
    )
    torch.save({"state_dict": {}, "global_step": 1}, second / "checkpoints" / "b.ckpt")
    assert run_folder(str(second / "checkpoints" / "a.ckpt"), outputs, "x", "new") == new, (
        "an older one: a run of its own"
    )
    run("3", None, checkpoint=False)
    assert unfinished_run(experiment) is None, "nothing to continue from"
    (second / "report.json").unlink()
    assert unfinished_run(experiment) == second, "a start that was refused hides no run"
    assert run_folder("nonsense", outputs, "x", "new") == new


def test_any_file_of_the_newest_moment_means_the_run(in_tmp: Path) -> None:
    run = in_tmp / "outputs" / "x" / "1"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("name: x\n")
    for name in ("interrupted.ckpt", "step-0000007.ckpt"):
        torch.save({"state_dict": {}, "global_step": 7}, run / "checkpoints" / name)
    (run / "checkpoints" / "last.ckpt").symlink_to("step-0000007.ckpt")
    (run.parent / "latest").symlink_to("1")
    for name in ("interrupted.ckpt", "step-0000007.ckpt", "last.ckpt"):
        for folder in (run, run.parent / "latest"):  # the link may point elsewhere soon
            assert run_folder(str(folder / "checkpoints" / name), str(in_tmp / "outputs"), "x", "new") == str(run)
    assert run_folder("/nothing.ckpt", str(in_tmp / "outputs"), "x", "new") == str(run.parent / "new")


def test_folders_of_a_sweep(in_tmp: Path) -> None:
    def run(name: str, overrides: list[str], status: str | None = None, checkpoint: bool = True) -> Path:
        folder = in_tmp / "outputs" / "x" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text("name: x\n")
        write_identity(folder, overrides)
        if checkpoint:
            torch.save({"state_dict": {}}, folder / "checkpoints" / "a.ckpt")
        if status:
            (folder / "report.json").write_text(json.dumps({"status": status}))
        return folder

    def folder(resume: str | None, *overrides: str) -> str:
        return sweep_folder(resume, str(in_tmp / "outputs"), "x", "new", overrides)

    run("a", ["name=x", "optim.lr=1"], "finished")
    run("b", ["name=x", "optim.lr=2"], "interrupted")
    run("c", ["name=x", "optim.lr=3"], checkpoint=False)
    assert folder(None, "name=x", "optim.lr=1") == "x/new"
    assert folder("auto", "optim.lr=1", "resume=auto", "name=x") == "x/a"
    assert folder("auto", "optim.lr=2", "resume=auto", "name=x") == "x/b"
    assert folder("auto", "optim.lr=3", "resume=auto", "name=x") == "x/new", "it has nothing to resume"
    assert folder("auto", "optim.lr=4", "resume=auto", "name=x") == "x/new"
    run("0", ["name=x", "optim.lr=1", "resume=auto"], "failed")
    assert folder("auto", "optim.lr=1", "resume=auto", "name=x") == "x/0", "the newest counts"


@pytest.mark.long
def test_a_sweep_that_was_preempted_resumes_where_it_was(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(in_tmp / "corpus")

    def sweep(*overrides: str) -> int:
        small = [*SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, "callbacks=basic"]
        return launch("-m", "data=text", corpus, *small, "name=sw", "optim.lr=1e-3,2e-3,3e-3", *overrides)

    def state(run: Path) -> tuple[bytes, ...]:
        return tuple((run / name).read_bytes() for name in ("metrics.jsonl", "report.json", "checkpoints/last.ckpt"))

    with monkeypatch.context() as patched:
        die_at(4 + 2, patched, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert sweep() == 75
    first, second = reversed(runs_in(in_tmp / "outputs" / "sw"))
    before = state(first)
    assert report_of(second)["status"] == "interrupted"
    assert sweep("resume=auto") == 0
    runs = [*reversed(runs_in(in_tmp / "outputs" / "sw"))]
    assert runs[:2] == [first, second]
    assert len(runs) == 3
    assert state(first) == before, "what is finished stays"
    assert [report_of(run)["status"] for run in runs] == ["finished"] * 3
    assert [row["step"] for row in read_rows(second / "metrics.jsonl")] == [*range(4)]
    assert [OmegaConf.load(run / "config.yaml").optim.lr for run in runs] == [1e-3, 2e-3, 3e-3]
    after = [state(run) for run in runs]
    assert sweep("resume=auto") == 0, "nothing is left to do"
    assert [state(run) for run in runs_in(in_tmp / "outputs" / "sw")][::-1] == after


def test_the_same_command_under_a_scheduler_changes_no_configuration(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch, code in ((2, 75), (2, 75), (99, 0)):
        with monkeypatch.context() as patched:
            die_at(batch, patched, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert small_run(in_tmp, "name=x", "callbacks=basic", "optim.total_steps=6", "resume=auto") == code
    run = only_run(in_tmp / "outputs")
    assert report_of(run)["status"] == "finished"
    assert not [*run.glob("*.1.*")], "nothing has changed, nothing is kept aside"
    assert "differs" not in (run / "train.log").read_text()


def test_an_older_checkpoint_begins_a_run_of_its_own(in_tmp: Path) -> None:
    assert small_run(in_tmp, "name=x", "callbacks.step_checkpoint.every_n_steps=2") == 0
    run = only_run(in_tmp / "outputs")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    time.sleep(1.1)  # folders are named by the second
    assert small_run(in_tmp, "name=x", f"resume={run}/checkpoints/step-0000002.ckpt") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((in_tmp / "outputs" / "x").glob("2*"))) == 2


def test_a_finished_run_resumes_when_it_is_given_more_steps(x: Path, in_tmp: Path) -> None:
    run = x
    assert small_run(in_tmp, "name=x", "resume=x", "optim.total_steps=6", "trainer.val_check_interval=100") == 0
    assert only_run(in_tmp / "outputs") == run
    assert report_of(run)["steps"] == 6
    rows = read_rows(run / "metrics.jsonl")
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    assert "total_steps: 4" in (run / "config.1.yaml").read_text()
    assert "total_steps: 6" in (run / "config.yaml").read_text()
    assert "resume: null" in (run / "config.yaml").read_text()


@pytest.mark.parametrize("refused", ["data.seq_len=16", "model.window=9", "trainer.accelerator=gpu"])
def test_a_refused_resume_leaves_the_run_as_it_was(
    x: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], refused: str
) -> None:
    run = x
    files = ("report.json", "report.md", "config.yaml", "environment.json", "metrics.jsonl", "checkpoints/last.ckpt")
    before = {name: (run / name).read_bytes() for name in files}
    capsys.readouterr()
    assert small_run(in_tmp, "name=x", f"resume={run}", refused) == 1
    printed = capsys.readouterr()
    assert len([line for line in printed.err.splitlines() if line.startswith("error: ")]) == 1
    assert "verdict" not in printed.out
    assert {name: (run / name).read_bytes() for name in files} == before
    assert not list(run.glob("*.1.*"))


def test_a_job_that_is_repeated_before_its_first_checkpoint_repeats_no_record(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins again in its own folder."""
    monkeypatch.setenv("ATLAS_LM_JOB", "one")
    assert small_run(in_tmp, "name=x") == 0
    run = only_run(in_tmp / "outputs")
    shutil.rmtree(run / "checkpoints")
    (run / "report.json").unlink()
    assert small_run(in_tmp, "name=x") == 0
    assert only_run(in_tmp / "outputs") == run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["global_step"] for row in rows if row["lm_loss"] is not None]
    assert steps == sorted(set(steps))


def test_a_signal_before_training_asks_for_a_requeue_too(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "load_starting_weights", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert small_run(in_tmp, "name=x") == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_once_the_verdict_is_written_a_signal_asks_for_nothing(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is started again with resume=auto would train everything again."""
    mark = atlas_lm.runs.lifecycle.mark_latest

    def late(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        mark(*args)

    monkeypatch.setattr(atlas_lm.runs.lifecycle, "mark_latest", late)
    monkeypatch.setattr(train, "judge", lambda *args: os.kill(os.getpid(), signal.SIGUSR1) or judge(*args))
    assert small_run(in_tmp, "name=x") == 0
    assert report_of(only_run(in_tmp / "outputs"))["status"] == "finished"
    assert (in_tmp / "outputs" / "x" / "latest").is_symlink()


def test_the_exit_code_is_the_same_before_training(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_starting_weights", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert small_run(in_tmp, "name=x", "callbacks.interrupt.requeue_exit_code=99") == 99


def test_weights_alone_cannot_be_resumed(x: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(x / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({name: content[name] for name in ("state_dict", "hyper_parameters")}, in_tmp / "weights.ckpt")
    capsys.readouterr()
    assert small_run(in_tmp, "name=y", "resume=weights.ckpt") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "weights.ckpt" in errors[0]
    assert "init_from=" in errors[0]


def test_auto_with_nothing_intact_is_an_error(x: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = x
    (run / "report.json").unlink()
    for path in (run / "checkpoints").glob("*.ckpt"):
        if not path.is_symlink():
            path.write_bytes(path.read_bytes()[:1000])
    capsys.readouterr()
    assert small_run(in_tmp, "name=x", "resume=auto") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no checkpoint of" in errors[0]
    assert "is intact" in errors[0]


def test_auto_takes_the_newest_intact_one_and_says_what_it_skipped(in_tmp: Path) -> None:
    assert small_run(in_tmp, "name=x", "callbacks.step_checkpoint.every_n_steps=1") == 0
    run = only_run(in_tmp / "outputs")
    (run / "report.json").unlink()
    newest = run / "checkpoints" / "step-0000004.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert small_run(in_tmp, "name=x", "resume=auto") == 0
    log = (run / "train.log").read_text()
    assert "step-0000004.ckpt' is damaged" in log
    assert f"resuming {run}/checkpoints/step-0000003.ckpt" in log
    assert report_of(run)["status"] == "finished"


def test_two_processes_do_not_write_to_one_run(in_tmp: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; f = open('.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, "
                               "flush=True); sys.stdin.read()"],
        cwd=in_tmp, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(ValueError, match="written to by another process"), locked(in_tmp):
        pass
    holder.kill()
    holder.communicate()
    with locked(in_tmp):
        pass
    with locked(in_tmp):
        pass


def test_what_has_changed_is_kept_aside(in_tmp: Path) -> None:
    path = in_tmp / "config.yaml"
    archive_if_changed(path, "a")
    path.write_text("a")
    archive_if_changed(path, "a")
    assert [p.name for p in in_tmp.iterdir()] == ["config.yaml"]
    for text in ("b", "c"):
        archive_if_changed(path, text)
        path.write_text(text)
    assert (in_tmp / "config.1.yaml").read_text() == "a"
    assert (in_tmp / "config.2.yaml").read_text() == "b"


def test_random_numbers_of_every_library_continue(in_tmp: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]  # noqa: NPY002

    draw()
    torch.save(states(), in_tmp / "states")
    wanted = [draw() for _ in range(3)]
    set_states(torch.load(in_tmp / "states", weights_only=True))
    assert [draw() for _ in range(3)] == wanted
