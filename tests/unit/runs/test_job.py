"""A job that is started again finds its own run among many, and a new one never takes another's."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atlas_lm.runs import resolve
from atlas_lm.runs.folder import bind, job_of, number_of, overrides_of, write_identity
from atlas_lm.runs.job import current_job, folder_of, is_alive
from atlas_lm.runs.lifecycle import resume_own_run
from atlas_lm.runs.resolve import run_folder, sweep_folder


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, "slurm-7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}, "slurm-7-0"),
        ({"PBS_JOBID": "12[3].server"}, "pbs-12-3-.server"),
        ({"LSB_JOBID": "5", "LSB_JOBINDEX": "0"}, "lsf-5"),
        ({"LSB_JOBID": "5", "LSB_JOBINDEX": "2"}, "lsf-5-2"),
        ({"TORCHELASTIC_RUN_ID": "none"}, None),
        ({"TORCHELASTIC_RUN_ID": "a/b"}, "torchrun-a-b"),
        ({"SLURM_JOB_ID": "7", "ATLAS_LM_JOB": "mine-3"}, "job-mine-3"),
        ({"SLURM_JOB_ID": ""}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "stage1"}, "slurm-7"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash", "ATLAS_LM_JOB": "mine"}, "job-mine"),
    ],
)
def test_what_a_job_is_called(environment: dict[str, str], job: str | None) -> None:
    assert current_job(environment) == job


@pytest.fixture
def in_job_7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")


def make_run(folder: Path, overrides: list[str], job: str | None) -> Path:
    """With a checkpoint's file: what counts is that training has begun."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "checkpoints" / "step-0000001.ckpt").touch()
    write_identity(folder, overrides, job)
    return folder


WORDS = ["+experiment=stage1", "seed=3"]


def test_all_ranks_and_repetitions_of_a_job_find_one_folder(in_job_7: None, tmp_path: Path) -> None:
    first = run_folder(None, str(tmp_path), "x", "2026-01-01", WORDS)
    assert first == run_folder(None, str(tmp_path), "x", "2026-01-02", WORDS[::-1]), "whatever the second"
    assert Path(first).name.startswith("slurm-7_")
    assert first != run_folder(None, str(tmp_path), "x", "2026-01-01", ["seed=4"]), "another thing that is trained"
    make_run(Path(first), WORDS, "slurm-7")
    assert run_folder(None, str(tmp_path), "x", "2026-01-03", WORDS) == first
    assert run_folder("auto", str(tmp_path), "x", "2026-01-03", [*WORDS, "resume=auto"]) == first


def test_it_finds_its_own_among_many_and_not_the_newest(in_job_7: None, tmp_path: Path) -> None:
    mine = make_run(tmp_path / "x" / "a", WORDS, "slurm-7")
    make_run(tmp_path / "x" / "b", WORDS, "slurm-8")
    make_run(tmp_path / "x" / "c", ["seed=4"], "slurm-7")
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == str(mine)
    assert sweep_folder(None, str(tmp_path), "x", "new", WORDS) == "x/a"
    new = sweep_folder(None, str(tmp_path), "x", "new", ["seed=5"])
    assert new == f"x/{folder_of('slurm-7', ['seed=5'])}", "the same on all ranks"


def test_a_new_job_takes_no_run_that_may_be_anothers(
    in_job_7: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make_run(tmp_path / "x" / "a", WORDS, "slurm-6")
    own = str(tmp_path / "x" / folder_of("slurm-7", sorted(WORDS)))
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == own
    alive = {"slurm-6"}
    monkeypatch.setattr(resolve, "is_alive", lambda job: job in alive)
    assert run_folder("auto", str(tmp_path), "x", "new", WORDS) == own, "it waits to be started again"
    alive.clear()
    assert run_folder("auto", str(tmp_path), "x", "new", WORDS) == str(theirs), "nobody will come back for it"
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == own, "and nobody has asked for it"
    bind(theirs, "slurm-7")
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == str(theirs), "now it is this job's"
    assert job_of(theirs) == "slurm-7"
    assert number_of(theirs) == 1
    assert overrides_of(theirs) == WORDS


def test_what_is_named_is_resumed(in_job_7: None, tmp_path: Path) -> None:
    theirs = make_run(tmp_path / "x" / "a", WORDS, "slurm-6")
    assert run_folder(str(theirs), str(tmp_path), "x", "new", WORDS) == str(theirs)


def test_what_is_named_is_resumed_by_a_launchers_job_too(
    in_job_7: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher submits a single run as a sweep of one job; those of a real sweep cannot all continue one run."""
    theirs = make_run(tmp_path / "x" / "a", WORDS, "slurm-6")
    alone = sweep_folder(str(theirs), str(tmp_path), "x", "new", ["seed=5"])
    assert alone == f"x/{folder_of('slurm-7', ['seed=5'])}", "-m in a batch script of one's own is a sweep"
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert sweep_folder(str(theirs), str(tmp_path), "x", "new", ["seed=5"]) == "x/a"
    assert sweep_folder(str(theirs), str(tmp_path), "y", "new", WORDS) == f"y/{folder_of('slurm-7', WORDS)}"
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    assert sweep_folder(str(theirs), str(tmp_path), "x", "new", WORDS) == f"x/{folder_of('slurm-7', WORDS)}"


def test_a_job_that_is_repeated_does_not_begin_again_where_it_was_told_to_begin(in_job_7: None, tmp_path: Path) -> None:
    """Each time limit would set it back there."""
    began = make_run(tmp_path / "x" / "a", WORDS, "slurm-6") / "checkpoints" / "step-0000001.ckpt"
    for job, resume in (("slurm-7", "auto"), ("slurm-6", str(began))):
        run = make_run(tmp_path / "y" / job, WORDS, job)
        cfg = OmegaConf.create(
            {"resume": str(began), "paths": {"run": str(run), "outputs": str(tmp_path)}, "name": "y"}
        )
        resume_own_run(cfg)
        assert cfg.resume == resume


def test_outside_a_job_nothing_has_changed(tmp_path: Path) -> None:
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == str(tmp_path / "x" / "new")
    newest = make_run(tmp_path / "x" / "a", WORDS, "slurm-6")
    assert run_folder("auto", str(tmp_path), "x", "new", WORDS) == str(newest)


@pytest.mark.parametrize(
    ("answer", "code", "alive"), [("  7  batch  PD", 0, True), ("", 0, False), ("slurm_load_jobs error", 1, False)]
)
def test_slurm_is_asked_whether_a_job_may_come_back(
    answer: str, code: int, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for squeue; tests/slurm asks the real one."""
    tool = tmp_path / "squeue"
    tool.write_text(f"#!/bin/sh\necho '{answer}' | grep . \nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert is_alive("slurm-7-2") == alive


def test_other_schedulers_jobs_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_alive("pbs-7")
    monkeypatch.setenv("PATH", "/nowhere")
    assert is_alive("slurm-7"), "there is no squeue to ask"
