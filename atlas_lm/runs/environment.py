"""What a run depended on beside its configuration: the code's git state, package versions, the machine."""

import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch


def environment(root: Path) -> dict[str, Any]:
    """JSON-ready description of the interpreter, the packages, the machine and the git state of `root`."""
    return {
        "command": [sys.executable, *sys.argv],
        "git": git_state(root),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions() if d.metadata["Name"])),
    }


def git_state(root: Path) -> dict[str, Any]:
    """Commit, and files that differ from it; `commit` null outside a repository or without git."""
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain")
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(changed),
        "changed": [line[3:] for line in (changed or "").splitlines()],
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
