"""What a user reads when a run is resumed, or when there is nothing to resume."""

from pathlib import Path

import pytest

from atlas_lm.runs.lifecycle import changed_keys
from atlas_lm.runs.report import how_to_continue
from atlas_lm.runs.resume import nothing_to_resume
from tests.unit.runs.test_runs import make_run


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        ("a: 1\nb: {c: 2, d: 3}\n", "a: 1\nb: {c: 2, d: 4}\n", "b.d"),
        ("a: 1\n", "a: 1\nb: {c: 2}\n", "b.c"),
        ("b: {c: 2}\n", "b: null\n", "b, b.c"),
        ('{"git": {"commit": "x"}, "python": "3.11"}', '{"git": {"commit": "y"}, "python": "3.11"}', "git.commit"),
        ("a: [1, 2]\n", "a: [1, 3]\n", "a"),
        ("a: 1\n", "a: [\n", "a, all"),
        ("".join(f"k{i}: 1\n" for i in range(9)), "".join(f"k{i}: 2\n" for i in range(9)),
         "k0, k1, k2, k3, k4, k5 and 3 more"),
    ],
)  # fmt: skip
def test_settings_that_changed_are_named(before: str, now: str, names: str) -> None:
    assert changed_keys(before, now) == names
    assert changed_keys(now, now) == ""


def test_whoever_forgot_the_experiment_reads_which_runs_wait(tmp_path: Path) -> None:
    assert "'default'" in nothing_to_resume(tmp_path / "nowhere", "default")
    make_run(tmp_path, "stage1", "a", ("step=1.ckpt",))
    done = make_run(tmp_path, "done", "a", ("step=1.ckpt",))
    (done / "report.json").write_text('{"status": "finished"}')
    found = nothing_to_resume(tmp_path, "default")
    assert "stage1" in found
    assert "done" not in found
    assert "unfinished" not in nothing_to_resume(tmp_path, "stage1").partition(";")[2]


def test_a_run_of_a_job_that_may_come_back_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "stage1", "a", ("step=1.ckpt",))
    (run / "run.json").write_text('{"job": "pbs-7"}')
    assert nothing_to_resume(tmp_path, "stage1").endswith(
        f"{run} is unfinished, of job pbs-7, which may come back: resume={run} takes it"
    )
    (run / "run.json").write_text('{"job": "slurm-7"}')
    assert nothing_to_resume(tmp_path, "stage1").endswith(f"come back: cancel the job, then resume={run} takes it")


@pytest.mark.parametrize(
    ("status", "error", "job", "says"),
    [
        ("interrupted", "KeyboardInterrupt:", None, "run the same command with resume=auto, or resume=r/check"),
        ("failed", "OSError: the disk is full", None, "the same command with resume=auto, or resume="),
        ("interrupted", "Preempted: SIGTERM", "slurm-7", "if job slurm-7 is started again, it continues by itself"),
        ("interrupted", "Preempted: SIGTERM", "slurm-7", "if it is not, the same command with resume=r"),
        ("failed", "TrainingUnstable: resume an earlier one", None, None),
        ("finished", None, None, None),
        ("stopped early", None, "slurm-7", None),
    ],
)  # fmt: skip
def test_the_last_line_says_how_to_continue(status: str, error: str | None, job: str | None, says: str | None) -> None:
    """Where the error names a checkpoint itself, another advice would contradict it."""
    found = how_to_continue(
        {"status": status, "error": error, "run": "r", "checkpoint": "r/checkpoints/last.ckpt"}, job
    )
    assert found is None if says is None else says in str(found)
    assert how_to_continue({"status": status, "error": error, "run": "r", "checkpoint": None}, job) is None
