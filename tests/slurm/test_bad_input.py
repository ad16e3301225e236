"""What a job cannot do is one clear line, of the value and the remedy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import SMALL, ended, killed_at, log_of, slurm_says, submit, wait_for
from tests.support import ROOT

pytestmark = pytest.mark.slurm


def test_more_nodes_than_the_allocation(slurm: Path, tmp_path: Path) -> None:
    words = [word for word in SMALL if word != "launcher=slurm"]
    command = [sys.executable, "train.py", *words, f"paths.outputs={tmp_path}", "name=many", "trainer=ddp",
               "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1"]  # fmt: skip
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH --output={tmp_path}/job.log --nodes=1\nsrun {' '.join(command)}\n")
    done = subprocess.run(["sbatch", "--wait", script], cwd=ROOT, timeout=120, check=False)
    assert done.returncode != 0
    printed = (tmp_path / "job.log").read_text()
    assert "Traceback" not in printed
    assert "trainer.num_nodes=2, and this job has SLURM_NNODES=1: give trainer.num_nodes=1, or --nodes=2" in printed


def test_several_devices_in_one_task(slurm: Path, tmp_path: Path) -> None:
    """It trained on every other sequence, and nothing said so."""
    words = [word for word in SMALL if word != "launcher=slurm"]
    command = [sys.executable, "train.py", *words, f"paths.outputs={tmp_path}", "name=one", "trainer=ddp",
               "trainer.accelerator=cpu", "trainer.devices=2"]  # fmt: skip
    done = subprocess.run(
        ["srun", "--ntasks=1", "--cpus-per-task=2", *command], cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "2 ranks are asked for (trainer.num_nodes × trainer.devices), and this job has SLURM_NTASKS=1" in done.stderr


def test_a_job_that_finds_two_runs_of_its_own(slurm: Path, tmp_path: Path) -> None:
    process = submit(tmp_path, "name=twice", "optim.total_steps=100000")
    try:
        run, job = killed_at(tmp_path, "twice", 25)
        copy = run.with_name(f"{run.name}_copy")
        shutil.copytree(run, copy)
        before = files_of(run), files_of(copy)
        assert ended(process, [job], 180) != 0
    finally:
        process.kill()
    printed = log_of(tmp_path).read_text() + "".join(path.read_text() for path in (tmp_path / ".slurm").rglob("*.out"))
    line = next(line for line in printed.splitlines() if run.name in line and copy.name in line)
    assert "resume=" in line
    assert (files_of(run), files_of(copy)) == before


def ended_as(job: str) -> str:
    """What SLURM says of a job that has ended."""
    shown = slurm_says("scontrol", "show", "job", job)
    return "" if "JobState=RUNNING" in shown or "JobState=COMPLETING" in shown else shown


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra.launcher.partition=nosuch", "error: sbatch refused the job (invalid partition specified: nosuch"),
        (
            "data.source.tokenizer=nosuch.json",
            "error: no tokenizer at 'nosuch.json': give 'bytes'",
        ),
    ],
)
def test_what_only_slurm_or_the_job_finds(slurm: Path, tmp_path: Path, word: str, message: str) -> None:
    """The command that waits for the job says it in one line, as the job did."""
    assert submit(tmp_path, "name=wrong", word).wait(120) == 1
    printed = log_of(tmp_path).read_text()
    assert message in [line[: len(message)] for line in printed.splitlines()]
    assert "Traceback" not in printed
    assert "squeue lists them" in printed
    if "sbatch" not in message:
        (job,) = [path.name for path in (tmp_path / ".slurm").iterdir() if path.is_dir()]
        shown = wait_for(lambda: ended_as(job), 30)
        assert "JobState=FAILED" in shown, "sacct would call it a success"
        assert "ExitCode=1:0" in shown


def files_of(run: Path) -> dict[str, bytes]:
    """What a run has come to: its records, checkpoints and identity."""
    files = [run / "metrics.jsonl", run / "run.json", run / "config.yaml", *(run / "checkpoints").iterdir()]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}
