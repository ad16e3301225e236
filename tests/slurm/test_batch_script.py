"""The lines before `srun`, the launcher's and those of docs/resume-and-clusters.md: what they queue again.

Ranks are stand-ins of one line, since what counts is how they end.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.slurm.jobs import slurm_says, wait_for
from tests.support import ROOT

pytestmark = pytest.mark.slurm

STANDS_STILL = "if [ $SLURM_PROCID = 1 ]; then kill -STOP $$; sleep 100; else sleep 1; exit 1; fi"
FAILS = "sleep $SLURM_PROCID; exit 1"
WAITS = "sleep 100"
SAVES = "trap 'sleep 1; exit 75' TERM; for i in $(seq 500); do sleep 0.2; done"


def launchers_lines(folder: Path) -> list[str]:
    """`setup` of conf/launcher/slurm.yaml."""
    (folder / ".slurm").mkdir()
    cfg = OmegaConf.load(ROOT / "conf" / "launcher" / "slurm.yaml")
    return list(OmegaConf.merge(cfg, {"paths": {"outputs": str(folder)}}).hydra.launcher.setup)


def pages_lines(folder: Path) -> list[str]:
    """Of the page's batch script, those between its options and `srun`."""
    page = (ROOT / "docs" / "resume-and-clusters.md").read_text(encoding="utf-8")
    script = page.partition("#!/bin/bash\n")[2].partition("\nsrun ")[0]
    return [line for line in script.splitlines() if not line.startswith("#SBATCH")]


def submitted(folder: Path, lines: list[str], rank: str) -> str:
    """The number of a job of two nodes, a rank each, which runs."""
    assert "export SLURM_WAIT=600" in lines
    before = "\n".join(lines).replace("SLURM_WAIT=600", "SLURM_WAIT=4")
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{before}\nsrun bash {folder}/rank.sh\n")
    (folder / "rank.sh").write_text(rank)
    job = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--requeue", f"--output={folder}/log", script],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    wait_for(lambda: "JobState=RUNNING" in slurm_says("scontrol", "show", "job", job), 30)
    return job


def end_of(job: str) -> str:
    """How SLURM calls it once nothing of it runs."""

    def over() -> str:
        shown = slurm_says("scontrol", "show", "job", job)
        state = shown.partition("JobState=")[2].split()[0]
        return "" if state in ("RUNNING", "COMPLETING") else state

    return wait_for(over, 90)


@pytest.mark.parametrize("lines", [launchers_lines, pages_lines])
def test_what_is_queued_again(slurm: Path, tmp_path: Path, lines: Callable[[Path], list[str]]) -> None:
    cases = (("stands still", STANDS_STILL, "PENDING"), ("fails", FAILS, "FAILED"),
             ("is killed", WAITS, "PENDING"), ("is cancelled", SAVES, "CANCELLED"))  # fmt: skip
    for name, rank, state in cases:
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        job = submitted(folder, lines(folder), rank)
        if name == "is killed":
            wait_for(lambda job=job: slurm_says("squeue", "--steps", "--noheader", "--job", job), 30)
            slurm_says("scancel", "--signal=KILL", f"{job}.0")
        if name == "is cancelled":
            wait_for(lambda job=job: slurm_says("squeue", "--steps", "--noheader", "--job", job), 30)
            slurm_says("scancel", job)
        assert end_of(job) == state, f"{name}: {(folder / 'log').read_text()}"
        slurm_says("scancel", job)
