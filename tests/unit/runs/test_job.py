"""A job that is started again finds its own run among many, and a new one never takes another's."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from atlas_lm.runs import lifecycle, resolve
from atlas_lm.runs.folder import bind, job_of, number_of, overrides_of, write_identity
from atlas_lm.runs.job import current_job, folder_of, still_known
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
    monkeypatch.setattr(resolve, "still_known", lambda job: job in alive)
    assert run_folder("auto", str(tmp_path), "x", "new", WORDS) == own, "it waits to be started again"
    alive.clear()
    assert run_folder("auto", str(tmp_path), "x", "new", WORDS) == str(theirs), "nobody will come back for it"
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == own, "and nobody has asked for it"
    bind(theirs, "slurm-7", ["seed=9"])
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == own, "the job trains it with other settings"
    assert run_folder(None, str(tmp_path), "x", "new", ["seed=9"]) == str(theirs), "now it is this job's"
    assert job_of(theirs) == "slurm-7"
    assert number_of(theirs) == 1
    assert overrides_of(theirs) == WORDS


def test_what_is_named_is_resumed(in_job_7: None, tmp_path: Path) -> None:
    theirs = make_run(tmp_path / "x" / "a", WORDS, "slurm-6")
    assert run_folder(str(theirs), str(tmp_path), "x", "new", WORDS) == str(theirs)
    own = tmp_path / "y" / folder_of("slurm-7", WORDS)
    assert run_folder(str(theirs), str(tmp_path), "y", "now", WORDS) == str(own), "the same on all ranks"


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


def config_of(run: str, outputs: Path, resume: str | None) -> DictConfig:
    return OmegaConf.create({"resume": resume, "paths": {"run": run, "outputs": str(outputs)}, "name": "x"})


@pytest.mark.parametrize("by", ["one's own script", "the launcher"])
@pytest.mark.parametrize("named", ["the newest checkpoint", "an older one", "another experiment's", "auto"])
def test_a_job_that_is_repeated_continues_its_own_run_whatever_it_began_from(
    named: str, by: str, in_job_7: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time limit would set it back there, or find that the named checkpoint is gone."""
    if by == "the launcher":
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(resolve, "still_known", lambda job: False)
    before = make_run(tmp_path / ("y" if named == "another experiment's" else "x") / "a", ["seed=1"], "slurm-6")
    files = [before / "checkpoints" / f"step-000000{n}.ckpt" for n in (1, 2)]
    files[1].touch()
    resume = {"an older one": str(files[0]), "auto": "auto"}.get(named, str(files[1]))
    words = [*WORDS, f"resume={resume}"]
    monkeypatch.setattr(lifecycle, "task_overrides", lambda: words)
    monkeypatch.setattr(resolve, "position", lambda file: (int(file.stem[-1]), 0))
    monkeypatch.setattr(resolve, "why_unusable", lambda file: None)

    def folder(now: str) -> Path:
        if by == "the launcher":
            return tmp_path / sweep_folder(resume, str(tmp_path), "x", now, words)
        return Path(run_folder(resume, str(tmp_path), "x", now, words))

    run = folder("2026-01-01")
    assert (run == before) == (named in ("the newest checkpoint", "auto"))
    assert folder("2026-01-02") == run, "all ranks find it"
    if run == before:
        bind(run, "slurm-7", words)
    else:
        make_run(run, words, "slurm-7")
    (run / "checkpoints" / "step-0000009.ckpt").touch()
    files[1].unlink()
    assert folder("2026-01-03") == run
    cfg = config_of(str(run), tmp_path, resume)
    resume_own_run(cfg)
    assert cfg.resume == "auto"


def test_a_launchers_job_prefers_its_own_run_to_a_newer_one(
    in_job_7: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command was submitted twice; with resume=auto the older job, queued again, took the newer one's run."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(resolve, "still_known", lambda job: True)
    words = [*WORDS, "resume=auto"]
    make_run(tmp_path / "x" / "mine", words, "slurm-7")
    make_run(tmp_path / "x" / "theirs", WORDS, "slurm-8")
    for count in ("1", "3"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", count)
        assert sweep_folder("auto", str(tmp_path), "x", "new", words) == "x/mine"
    bind(tmp_path / "x" / "mine", "slurm-9", words)
    for count in ("1", "3"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", count)
        new = sweep_folder("auto", str(tmp_path), "x", "new", words)
        assert new == f"x/{folder_of('slurm-7', sorted(WORDS))}", "their jobs may come back for them"


def test_the_run_of_a_job_that_waits_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, outside a job: the job would find no run of its own, and begin again."""
    run = make_run(tmp_path / "x" / "a", WORDS, "slurm-6-2")
    for resume in ("auto", str(run)):
        monkeypatch.setattr(lifecycle, "still_known", lambda job: True)
        with pytest.raises(ValueError, match=r"x/a' is the run of job slurm-6-2, .* scancel 6_2"):
            resume_own_run(config_of(str(run), tmp_path, resume))
        monkeypatch.setattr(lifecycle, "still_known", lambda job: None)
        resume_own_run(config_of(str(run), tmp_path, resume))
    monkeypatch.setattr(lifecycle, "still_known", lambda job: True)
    (run / "report.json").write_text('{"status": "finished"}')
    resume_own_run(config_of(str(run), tmp_path, str(run)))  # more steps for a finished one


def test_outside_a_job_nothing_has_changed(tmp_path: Path) -> None:
    assert run_folder(None, str(tmp_path), "x", "new", WORDS) == str(tmp_path / "x" / "new")
    newest = make_run(tmp_path / "x" / "a", WORDS, "slurm-6")
    assert run_folder("auto", str(tmp_path), "x", "new", WORDS) == str(newest)


@pytest.mark.parametrize(
    ("answer", "code", "known"),
    [
        ("  7  batch  PD", 0, True),
        ("", 0, False),
        ("slurm_load_jobs error: Invalid job id specified", 1, False),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1, None),
    ],
)
def test_slurm_is_asked_whether_a_job_may_come_back(
    answer: str, code: int, known: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for squeue; tests/slurm asks the real one."""
    tool = tmp_path / "squeue"
    tool.write_text(f"#!/bin/sh\necho '{answer}' | grep . >&{2 if code else 1}\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert still_known("slurm-7-2") is known


def test_of_other_schedulers_jobs_there_is_no_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert still_known("pbs-7") is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert still_known("slurm-7") is None, "there is no squeue to ask"
