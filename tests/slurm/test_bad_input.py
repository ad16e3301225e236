"""What a job cannot do is one clear line, of the value and the remedy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import SMALL, ended, killed_at, log_of, read_json, step_of, submit
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


def test_a_job_that_finds_two_runs_of_its_own(slurm: Path, tmp_path: Path) -> None:
    process = submit(tmp_path, "name=twice", "optim.total_steps=100000")
    try:
        run, job = killed_at(tmp_path, "twice", 25)
        copy = run.with_name(f"{run.name}_copy")
        shutil.copytree(run, copy)
        before = read_json(run / "manifest.json"), step_of(run), step_of(copy)
        assert ended(process, [job], 180) != 0
    finally:
        process.kill()
    printed = log_of(tmp_path).read_text() + "".join(path.read_text() for path in (tmp_path / ".slurm").rglob("*.out"))
    line = next(line for line in printed.splitlines() if run.name in line and copy.name in line)
    assert "resume=" in line
    assert (read_json(run / "manifest.json"), step_of(run), step_of(copy)) == before
