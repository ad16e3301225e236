"""The scheduler's job that this process runs in: so that a job that is started again finds its own run, among many."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence

# Where schedulers say which job this is; a job that they queue again keeps these. The first that is set counts. Each is
# the name of the scheduler, the variables that make the job, and those that tell jobs of one array or set apart.
SCHEDULERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("job", ("ATLAS_LM_JOB",), ()),  # of one's own making: what else is started again, such as a job of Kubernetes
    ("slurm", ("SLURM_ARRAY_JOB_ID",), ("SLURM_ARRAY_TASK_ID",)),
    ("slurm", ("SLURM_JOB_ID",), ()),
    ("pbs", ("PBS_JOBID",), ()),
    ("lsf", ("LSB_JOBID",), ("LSB_JOBINDEX",)),
    ("torchrun", ("TORCHELASTIC_RUN_ID",), ()),
)

INTERACTIVE = ("bash", "sh", "zsh", "interactive")  # names of the jobs of salloc and srun --pty
# set within an array alone, where 0 is a task like the others; elsewhere 0 says that there is none
COUNTED_FROM_ZERO = {"SLURM_ARRAY_TASK_ID"}


def current_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """A name for the job, fit for a file name; None outside one, and in a shell that was allocated: it is no run's."""
    for scheduler, names, parts in SCHEDULERS:
        given = [environment.get(name, "") for name in names]
        if not all(given) or given == ["none"]:  # torchrun's default
            continue
        if scheduler == "slurm" and environment.get("SLURM_JOB_NAME") in INTERACTIVE:
            continue
        said = {name: environment.get(name, "0") for name in parts}
        more = [value for name, value in said.items() if value not in ("", "0") or name in COUNTED_FROM_ZERO]
        text = "-".join([scheduler, *given, *more])
        return re.sub(r"[^\w.-]", "-", text)
    return None


def is_submitted_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has submitted this job for one run. Those of a sweep are an array; `-m` in a job of one's own
    trains one after another, and is no launcher's."""
    return "SUBMITIT_EXECUTOR" in environment and environment.get("SLURM_ARRAY_TASK_COUNT", "1") == "1"


def still_known(job: str) -> bool | None:
    """Whether SLURM knows a job, which then runs, or waits to run again. None: there is no telling, as of others' jobs,
    or while SLURM's controller does not answer."""
    name = re.fullmatch(r"slurm-(\d+)(?:-(\d+))?", job)
    if name is None:
        return None
    asked = ["squeue", "--noheader", "--jobs", "_".join(part for part in name.groups() if part)]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return False if "Invalid job id" in done.stderr else None  # a job that is long gone is an error of squeue
    return bool(done.stdout.strip())


def folder_of(job: str, overrides: Sequence[str]) -> str:
    """The name of a run's folder: of the job, and of what is trained, since a job may train several things."""
    return f"{job}_{hashlib.sha256(chr(10).join(overrides).encode()).hexdigest()[:6]}"
