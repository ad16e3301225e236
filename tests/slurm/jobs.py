"""Runs as jobs of the SLURM that `conftest` starts: submitted as a user does, watched from outside, killed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.support import ROOT

SMALL = [
    "+experiment=stage1", "launcher=slurm", "model=tiny_deep", "model.dim=32", "model.head_dim=16", "model.rank=15",
    "model.layers=1", "data.source.tokenizer=bytes", "data.seq_len=256", "data.batch_size=2", "data.val_sequences=4",
    "trainer.val_check_interval=100", "callbacks.niah_probe.every_n_steps=1000",
    "callbacks.memory_horizon.every_n_steps=1000", "callbacks.memory_contribution.every_n_steps=1000",
    "callbacks.step_checkpoint.every_n_steps=20", "trainer.log_every_n_steps=1", "optim.total_steps=40",
]  # fmt: skip
TWO_NODES = [
    "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1", "data.batch_size=1",
]  # fmt: skip


def submit(outputs: Path, *words: str) -> subprocess.Popen[bytes]:
    """One command, as a user gives it; what it prints is in `log_of(outputs)`."""
    command = [sys.executable, "train.py", *SMALL, f"paths.outputs={outputs}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log_of(outputs).open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def log_of(outputs: Path) -> Path:
    return outputs / "submitted.log"


def run_of(outputs: Path, name: str) -> Path:
    """The experiment's only run."""
    (run,) = [path for path in (outputs / name).iterdir() if not path.is_symlink()]
    return run


def losses(run: Path) -> dict[int, float]:
    """By optimizer step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["global_step"]: row["lm_loss"] for row in rows if row["lm_loss"] is not None}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def slurm_says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def wait_for(what: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds:.0f} s")


def step_of(run: Path) -> int:
    """How far a run is."""
    try:
        return max(losses(run), default=0)
    except (OSError, ValueError):
        return 0


def killed_at(outputs: Path, name: str, step: int) -> tuple[Path, str]:
    """The experiment's only run and its job, whose step gets SIGKILL as soon as it is so far: it waits to run again."""
    run = wait_for(lambda: (outputs / name).is_dir() and run_of(outputs, name), 120)
    wait_for(lambda: step_of(run) >= step, 120)
    job = slurm_says("squeue", "--noheader", "--format=%A")
    slurm_says("scancel", "--signal=KILL", f"{job}.0")
    wait_for(lambda: "PENDING" in slurm_says("scontrol", "show", "job", job), 90)
    return run, job


def ended(process: subprocess.Popen[bytes], jobs: list[str], seconds: float) -> int:
    """Its exit code. Jobs that were queued again wait for ten seconds instead of SLURM's two minutes.

    Less is too soon: a node takes nothing of a job whose credential it has just revoked, and SLURM forgets the job.
    """

    def over() -> bool:
        for job in jobs:
            shown = dict(word.partition("=")[::2] for word in slurm_says("scontrol", "show", "job", job).split())
            if shown.get("JobState") == "PENDING":
                left = datetime.fromisoformat(shown["EligibleTime"]) - datetime.now()
                if left.total_seconds() > 12:
                    slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now+10")

        return process.poll() is not None

    wait_for(over, seconds)
    return process.returncode
