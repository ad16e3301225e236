"""What about a machine would cost a run its speed or its life: fine here, and found where it is planted."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.runs import checkup
from atlas_lm.runs.checkup import FINE, MIND, PROBLEM, Finding, Wanted
from tests.support import ROOT


def of(tmp_path: Path, **changes: Any) -> Wanted:
    return Wanted(tmp_path, "cpu", 1, 1, 1e6, 1e6)._replace(**changes)


def look(name: str, wanted: Wanted) -> Finding:
    return next(finding for finding in checkup.examine(wanted) if finding.name == name)


def test_nothing_is_wrong_here(tmp_path: Path) -> None:
    found = checkup.examine(of(tmp_path))
    assert [f.name for f in found] == [
        "python", "compiler", "device", "threads", "network", "scheduler", "memory", "disk", "locks", "clock",
    ]  # fmt: skip
    assert [f for f in found if f.state == PROBLEM] == []
    assert all(f.remedy for f in found if f.state != FINE)


@pytest.mark.slow
def test_three_planted_problems_are_named_by_the_command(tmp_path: Path) -> None:
    """No compiler, another allocation than asked for, and no GPU; each with its remedy, and exit code 1."""
    small = [
        "model=tiny_deep",
        "model.layers=1",
        "model.dim=32",
        "model.head_dim=16",
        "model.rank=15",
        "data.seq_len=64",
    ]
    planted = {"CXX": "/bin/false", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "2"}
    ended = subprocess.run(
        [sys.executable, "-m", "atlas_lm", "doctor", *small, "trainer=gpu", f"paths.outputs={tmp_path}"],
        cwd=ROOT, env={**os.environ, **planted, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") or "\nerror: " in ended.stderr
    assert "install g++ 9 or newer, or name a compiler by CXX" in ended.stderr
    assert "trainer.num_nodes=2, or --nodes=1" in ended.stderr
    assert "trainer.accelerator=gpu, and no GPU" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    assert look("device", of(tmp_path, accelerator="gpu")) == Finding(
        "device", PROBLEM, "trainer.accelerator=gpu, and no GPU", "trainer=cpu"
    )


def test_gpus_that_torch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a card'\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    found = look("device", of(tmp_path))
    assert found.state == PROBLEM
    assert found.what.startswith("1 GPUs, and torch")
    assert "install torch with CUDA" in found.remedy


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    found = look("disk", of(tmp_path, disk=1e18))
    assert found.state == PROBLEM
    assert "keep_last" in found.remedy
    assert look("disk", of(tmp_path / "not" / "yet")).state == FINE


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.isdir("/proc/1"), reason="no folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    found = look("disk", of(Path("/proc/1")))
    assert found.state == PROBLEM
    assert "paths.outputs" in found.remedy


def test_snapshots_that_do_not_fit(tmp_path: Path) -> None:
    assert look("memory", of(tmp_path, memory=1e18)).state == PROBLEM


def test_a_machine_without_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-machine.invalid")
    assert look("network", of(tmp_path)).state == MIND, "one process needs none"
    assert look("network", of(tmp_path, nodes=2)).state == PROBLEM
    assert "/etc/hosts" in look("network", of(tmp_path, devices=2)).remedy


def test_a_clock_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = checkup.time.time
    monkeypatch.setattr(checkup.time, "time", lambda: now() + 3600)
    found = look("clock", of(tmp_path))
    assert found.state == MIND
    assert "+3600 s" in found.what


def test_more_threads_or_ranks_than_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(checkup.torch, "get_num_threads", lambda: cores + 3)
    assert look("threads", of(tmp_path)).remedy == f"OMP_NUM_THREADS={cores}"
    assert look("threads", of(tmp_path, devices=cores + 1)).remedy == f"trainer.devices={cores}"


@pytest.mark.parametrize(
    ("given", "asked", "state"),
    [
        ({"NNODES": "2", "NTASKS": "4", "NTASKS_PER_NODE": "2"}, {"nodes": 2, "devices": 2}, FINE),
        ({"NNODES": "2", "NTASKS": "4"}, {"nodes": 2, "devices": 2}, PROBLEM),
        ({"NNODES": "1", "NTASKS": "1"}, {"nodes": 1, "devices": 8}, PROBLEM),
        ({"NNODES": "2", "NTASKS": "2"}, {"nodes": 2, "devices": 2}, PROBLEM),
        ({"NNODES": "1", "NTASKS": "2"}, {"nodes": 2, "devices": 1}, PROBLEM),
        ({"NNODES": "2", "NTASKS_PER_NODE": "2"}, {"nodes": 2, "devices": 1}, PROBLEM),
        ({"NNODES": "2"}, {"nodes": 2, "devices": None}, FINE),
        ({"NNODES": "2", "NTASKS_PER_NODE": "2(x3)"}, {"nodes": 2, "devices": None}, FINE),
    ],
)
def test_an_allocation_that_is_not_the_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], asked: dict[str, Any], state: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("NNODES", "NTASKS", "NTASKS_PER_NODE"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = look("scheduler", of(tmp_path, **asked))
    assert found.state == state
    assert bool(found.remedy) == (state == PROBLEM)
