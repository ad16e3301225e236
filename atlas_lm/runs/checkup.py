"""What about this machine would cost a run its speed or its life: each with what to change."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from atlas_lm.memory.kernels import compiled
from atlas_lm.training.allocation import other_allocation

FINE, MIND, PROBLEM = "fine", "mind", "problem"
SKEW = 5.0  # seconds that the clocks of this machine and of the filesystem may differ
LEAST_PYTHON = (3, 11)


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: str  # fine | mind: slower, or a chance | problem: a run would fail, or take several times as long
    what: str
    remedy: str = ""


class Wanted(NamedTuple):
    """What the run to come needs of the machine."""

    outputs: Path
    accelerator: str
    devices: int | None  # on each machine; None: as many as there are
    nodes: int
    disk: float  # bytes that its checkpoints and snapshots take
    memory: float  # bytes of main memory that its snapshots take on each machine


def examine(wanted: Wanted) -> list[Finding]:
    """All of it, in the order in which a run would meet it."""
    checks: tuple[Callable[[Wanted], Finding], ...] = (
        python, compiler, device, threads, network, scheduler, memory, disk, locks, clock,
    )  # fmt: skip
    return [check(wanted) for check in checks]


def python(wanted: Wanted) -> Finding:
    """Interpreter and torch."""
    what = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    if sys.version_info < LEAST_PYTHON:
        return Finding("python", PROBLEM, what, "use Python 3.11 or newer")
    return Finding("python", FINE, what)


def compiler(wanted: Wanted) -> Finding:
    """Whether the loops of a CPU can be compiled; they are, here."""
    if compiled.library() is not None:
        return Finding("compiler", FINE, "the memory's loops for a CPU are compiled")
    state = PROBLEM if wanted.accelerator == "cpu" else MIND
    what = "the memory's loops for a CPU cannot be compiled: PyTorch runs them, several times slower"
    return Finding("compiler", state, what, "install g++ 9 or newer, or name a compiler by CXX")


def device(wanted: Wanted) -> Finding:
    """GPUs, Triton, and what precision: auto will be."""
    count = torch.cuda.device_count()
    if count == 0:
        seen = _lines("nvidia-smi", "-L")
        if seen:
            what = f"{len(seen)} GPUs, and torch {torch.__version__} is built without CUDA or cannot reach them"
            return Finding("device", PROBLEM, what, "install torch with CUDA, or update the driver")
        if wanted.accelerator != "cpu":
            return Finding("device", PROBLEM, f"trainer.accelerator={wanted.accelerator}, and no GPU", "trainer=cpu")
        fast = torch.cpu._is_amx_tile_supported()
        return Finding("device", FINE, f"no GPU; precision auto is {'bf16-mixed' if fast else '32-true'} on this CPU")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    if wanted.devices is not None and wanted.accelerator != "cpu" and wanted.devices > count:
        what = f"trainer.devices={wanted.devices}, and {count} GPUs: {names}"
        return Finding("device", PROBLEM, what, f"trainer.devices={count}")
    try:
        import triton
    except ImportError:
        return Finding(
            "device", MIND, f"{names}; no Triton: the memory runs in PyTorch operations", "pip install triton"
        )
    what = f"{names}; CUDA {torch.version.cuda}, triton {triton.__version__}"
    if wanted.accelerator == "cpu":
        return Finding("device", MIND, f"{what}; and trainer.accelerator=cpu", "trainer=gpu")
    return Finding("device", FINE, what)


def threads(wanted: Wanted) -> Finding:
    """Threads for the cores that this process may use."""
    cores, count = len(os.sched_getaffinity(0)), torch.get_num_threads()
    ranks = (wanted.devices or 1) if wanted.accelerator == "cpu" else 1
    what = f"{count} threads of PyTorch on {cores} cores"
    if ranks > cores:
        return Finding("threads", MIND, f"{ranks} ranks on {cores} cores", f"trainer.devices={cores}")
    if count > cores:
        return Finding("threads", MIND, f"{what}: they wait for each other", f"OMP_NUM_THREADS={cores}")
    if ranks == 1 and count < cores and wanted.accelerator == "cpu":
        return Finding("threads", MIND, what, f"OMP_NUM_THREADS={cores}, where nothing else runs here")
    return Finding("threads", FINE, what)


def network(wanted: Wanted) -> Finding:
    """Whether ranks could find each other: by gloo on a CPU, by NCCL on GPUs."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        several = wanted.nodes > 1 or (wanted.devices or 1) > 1
        what = f"the name of this machine, {name}, has no address: ranks could not find each other"
        remedy = (
            f"add it to /etc/hosts, or export GLOO_SOCKET_IFNAME and MASTER_ADDR ({name} → 127.0.0.1 for one machine)"
        )
        return Finding("network", PROBLEM if several else MIND, what, remedy)
    nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    what = f"{name} is {address}; ranks talk by {'NCCL' if nccl and wanted.accelerator != 'cpu' else 'gloo'}"
    if wanted.accelerator != "cpu" and torch.cuda.is_available() and not nccl:
        return Finding("network", PROBLEM, f"{what}, and this torch has no NCCL", "install torch with NCCL")
    return Finding("network", FINE, what)


def scheduler(wanted: Wanted) -> Finding:
    """Whether an allocation of SLURM is the one that the settings ask for."""
    if "SLURM_JOB_ID" not in os.environ:
        there = shutil.which("sbatch") is not None
        return Finding("scheduler", FINE, "SLURM is here, this is no job of it" if there else "no SLURM")
    given = {name: _whole(os.environ.get(f"SLURM_{name}")) for name in ("NNODES", "NTASKS")}
    what = f"SLURM job {os.environ['SLURM_JOB_ID']}: {given['NNODES']} nodes, {given['NTASKS']} tasks"
    differs = other_allocation(wanted.nodes, wanted.devices)
    if differs is not None:
        return Finding("scheduler", PROBLEM, *differs)
    return Finding("scheduler", FINE, what)


def memory(wanted: Wanted) -> Finding:
    """Main memory for the snapshots."""
    total, free = _main_memory()
    what = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB of main memory free; snapshots take {wanted.memory / 1e9:.1f} GB"
    if wanted.memory > free:
        return Finding("memory", PROBLEM, what, "lower callbacks.spike_rollback.keep_last, or use trainer=fsdp")
    return Finding("memory", FINE, what)


def disk(wanted: Wanted) -> Finding:
    """Room for what a run writes."""
    folder = _existing(wanted.outputs)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("disk", PROBLEM, f"{folder} cannot be written to ({error.strerror})", "paths.outputs=<a folder>")
    free = shutil.disk_usage(folder).free
    what = f"{free / 1e9:.1f} GB free in {folder}; checkpoints and snapshots of a run take {wanted.disk / 1e9:.1f} GB"
    if wanted.disk > free:
        remedy = "free space, choose another paths.outputs, or lower callbacks.spike_rollback.keep_last"
        return Finding("disk", PROBLEM, what, remedy)
    return Finding(
        "disk", FINE if free > 3 * wanted.disk else MIND, what, "free space" if free <= 3 * wanted.disk else ""
    )


def locks(wanted: Wanted) -> Finding:
    """Whether the filesystem keeps two processes out of one run."""
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(wanted.outputs)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        what = f"no locks in {_existing(wanted.outputs)} ({error.strerror}): a file .owner stands for one"
        return Finding("locks", MIND, what, "after a crash on another machine remove it by hand")
    return Finding("locks", FINE, "the filesystem has locks")


def clock(wanted: Wanted) -> Finding:
    """This machine's clock, against the one that dates its files."""
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(wanted.outputs)) as file:
            apart = time.time() - os.fstat(file.fileno()).st_mtime
    except OSError as error:
        return Finding("clock", MIND, f"no file to compare it with ({error.strerror})")
    if abs(apart) > SKEW:
        what = f"this machine's clock is {apart:+.0f} s from that of {_existing(wanted.outputs)}"
        return Finding("clock", MIND, f"{what}: names and ages of runs mislead; their order does not", "set it by NTP")
    return Finding("clock", FINE, f"within {SKEW:.0f} s of the filesystem's")


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above that there is."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _lines(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _main_memory() -> tuple[float, float]:
    """Bytes in all, and those that a process could have."""
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024.0 * int(rows["MemTotal"].split()[0]), 1024.0 * int(rows["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return float(pages), float(pages)
