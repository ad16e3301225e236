"""Runs and sweeps as jobs of a real SLURM: submitted by one command, ended by time limits and kills, and going on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import (
    TWO_NODES,
    ended,
    killed_at,
    log_of,
    losses,
    read_json,
    run_of,
    slurm_says,
    step_of,
    submit,
    wait_for,
)
from tests.support import ROOT

pytestmark = pytest.mark.slurm


def test_a_run_on_two_nodes_is_one_run(slurm: Path, tmp_path: Path) -> None:
    process = submit(tmp_path, "name=nodes", *TWO_NODES)
    assert process.wait(180) == 0, log_of(tmp_path).read_text()[-2000:]
    run = run_of(tmp_path, "nodes")
    assert read_json(run / "report.json")["status"] == "finished"
    assert run.name.startswith("slurm-")
    assert len(losses(run)) == 40


def test_a_sweep_says_which_job_failed(slurm: Path, tmp_path: Path) -> None:
    """One has a bad value, two are queued again at once: three finish in folders of their own; exit code and list tell.

    A refused value ends its job before there is a run; one that training fails at leaves a row.
    """
    rates = ["1e-3", "2e-3", "3e-3", "1e30"]
    process = submit(tmp_path, "name=sweep", "optim.total_steps=80", f"optim.lr={','.join(rates)}")

    def runs() -> list[Path]:
        folder = tmp_path / "sweep"
        return [path for path in folder.iterdir() if not path.is_symlink()] if folder.is_dir() else []

    def training() -> list[Path]:
        return [run for run in runs() if 8 <= step_of(run) < 70 and not read_json(run / "report.json")]

    try:
        again = wait_for(lambda: len(found := training()) >= 2 and found[:2], 240)
        jobs = [read_json(run / "run.json")["job"] for run in again]
        for job in jobs:
            slurm_says("scontrol", "requeue", str(job).removeprefix("slurm-").replace("-", "_"))
        queued = slurm_says("squeue", "--noheader", "--format=%A").split()
        assert ended(process, queued, 400) != 0
    finally:
        process.kill()
        process.wait()
    statuses = [str(read_json(run / "report.json").get("status")) for run in runs()]
    assert sorted(statuses) == ["failed", "finished", "finished", "finished"]
    assert all(len(losses(run)) == 80 for run in runs() if read_json(run / "report.json")["status"] == "finished")
    assert all("resuming" in (run / "train.log").read_text() for run in again)
    listed = subprocess.run(
        [sys.executable, "-m", "atlas_lm", "compare", "sweep", f"outputs={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert listed.stdout.count("| finished") == 3
    assert listed.stdout.count("| failed") == 1


def test_a_cancelled_job_is_saved_and_stays_ended(slurm: Path, tmp_path: Path) -> None:
    process = submit(tmp_path, "name=cancelled", "optim.total_steps=100000")
    try:
        run = wait_for(lambda: (tmp_path / "cancelled").is_dir() and run_of(tmp_path, "cancelled"), 120)
        wait_for(lambda: step_of(run) >= 10, 120)
        job = slurm_says("squeue", "--noheader", "--format=%A")
        slurm_says("scancel", job)
        wait_for(lambda: read_json(run / "report.json").get("status") == "interrupted", 60)
        wait_for(lambda: not slurm_says("squeue", "--noheader", "--format=%A"), 60)
        process.terminate()  # without accounting it would wait on; whoever starts it again at 75 would submit again
        assert process.wait(30) == 130
        assert "SIGTERM: this command ends, the jobs stay" in log_of(tmp_path).read_text()
    finally:
        process.kill()
        process.wait()
    done = read_json(run / "report.json")["steps"]
    assert done >= 10
    listed = subprocess.run(
        [sys.executable, "-m", "atlas_lm", "runs", f"outputs={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert "interrupted" in listed.stdout
    again = submit(tmp_path, "name=cancelled", f"optim.total_steps={done + 5}", f"resume={run}")
    assert again.wait(180) == 0, log_of(tmp_path).read_text()[-2000:]
    assert read_json(run / "report.json")["status"] == "finished"
    assert len(losses(run)) == done + 5


def test_a_killed_process_goes_on_with_nothing_lost(slurm: Path, tmp_path: Path) -> None:
    """SIGKILL to a step: SLURM starts the job again, which finds its run; the losses are as if nothing had been."""
    undisturbed = submit(tmp_path, "name=calm", "optim.total_steps=120", "data.seq_len=512")
    assert undisturbed.wait(240) == 0
    process = submit(tmp_path, "name=killed", "optim.total_steps=120", "data.seq_len=512")
    try:
        run, job = killed_at(tmp_path, "killed", 45)
        assert ended(process, [job], 240) == 0
        assert len((tmp_path / ".slurm" / f"{job}.kills").read_text().splitlines()) == 1
    finally:
        process.kill()
    assert read_json(run / "report.json")["status"] == "finished"
    assert losses(run) == losses(run_of(tmp_path, "calm"))


@pytest.mark.slow
def test_time_limits_kills_and_a_lost_node_cost_nothing(slurm: Path, tmp_path: Path) -> None:
    """Two nodes, a time limit of a minute, a killed step, a killed slurmd: 300 losses bitwise as if nothing had been.

    Not one command of a user in between; the node that was lost comes back, as an administrator sees to.
    """
    words = [*TWO_NODES, "optim.total_steps=300", "data.seq_len=1024", "data.batch_size=16"]
    undisturbed = submit(tmp_path, "name=calm", *words)
    assert undisturbed.wait(600) == 0
    process = submit(tmp_path, "name=hard", *words, "hydra.launcher.timeout_min=1",
                     "++hydra.launcher.additional_parameters.signal=USR1@25")  # fmt: skip
    started = time.monotonic()
    try:
        run = wait_for(lambda: (tmp_path / "hard").is_dir() and run_of(tmp_path, "hard"), 120)
        job = slurm_says("squeue", "--noheader", "--format=%A")
        logs = tmp_path / ".slurm"
        log = logs / job / f"{job}_0_log.out"

        def restarts() -> int:
            shown = slurm_says("scontrol", "show", "job", job)
            return int(next(word for word in shown.split() if word.startswith("Restarts=")).partition("=")[2])

        def limits() -> int:
            return log.read_text().count(f"SLURM queues job {job} again")

        wait_for(lambda: step_of(run) >= 20, 120)
        slurm_says("scancel", "--signal=KILL", f"{job}.0")
        wait_for(lambda: restarts() == 1, 60)
        assert limits() == 0
        lost = False
        while not lost and process.poll() is None:  # again where the time limit came before SLURM missed the node
            before = restarts(), limits()
            wait_for(lambda: slurm_says("squeue", "--noheader", "--format=%T") == "RUNNING", 600)
            time.sleep(5)
            os.kill(int((slurm / "slurmd-n2.pid").read_text()), 9)
            wait_for(lambda n=before[0]: restarts() > n or process.poll() is not None, 90)  # type: ignore[misc]
            lost = (restarts(), limits()) == (before[0] + 1, before[1])
            time.sleep(5)
            subprocess.run(["slurmd", "-N", "n2", "-f", str(slurm / "slurm.conf")], check=True)
        assert process.wait(3000) == 0
    finally:
        process.kill()
    print(f"{time.monotonic() - started:.0f} s, {restarts()} restarts, {limits()} of them at the time limit")
    assert lost
    assert limits() >= 1
    assert restarts() >= limits() + 2, "a killed step and a lost node beside the time limits"
    assert read_json(run / "report.json")["status"] == "finished"
    assert losses(run) == losses(run_of(tmp_path, "calm"))
