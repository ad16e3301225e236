"""The reports and the training runs that there are below some folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from atlas_lm.config.parsing import CONFIG
from atlas_lm.inspection.schema import Report, read

HEAD = 200  # bytes in which a report has said what it is
MARK = b'"schema_version"'
SKIPPED = {"checkpoints", "tensorboard", "wandb", "csv"}  # folders of a run without reports
NAME = "report.json"  # also of a training run's verdict, which lies beside its configuration


class Found(NamedTuple):
    """A file that is a report, or should be one."""

    path: Path
    report: Report | None
    error: str  # why it cannot be read; empty where it can


def report_files(folders: Iterable[Path]) -> list[Path]:
    """Files that are reports, the newest first, each once. Folders that are not there have none."""
    found = {path.resolve(): None for folder in folders for path in _walk(folder)}
    return sorted(found, key=_age)


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED)
        is_run = CONFIG in files
        for name in files:
            path = Path(place, name)
            if name.endswith(".json") and _is_report(path, named_so=name == NAME and not is_run):
                yield path


def _is_report(path: Path, named_so: bool) -> bool:
    """Whether it says so, or has the name of one where nothing else has it: an empty file says nothing."""
    if named_so:
        return True
    try:
        with path.open("rb") as file:
            return MARK in file.read(HEAD)
    except OSError:
        return False


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def stamp(path: Path) -> tuple[int, int]:
    """Changes whenever the file does: (ns, bytes); zeros where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def load(path: Path) -> Found:
    """A report, or why it is none: one that is broken does not hide the others."""
    try:
        return Found(path, read(path), "")
    except ValueError as error:
        return Found(path, None, str(error))
    except OSError as error:
        return Found(path, None, f"{path} cannot be read: {error.strerror}")


def run_folders(outputs: Path) -> list[Path]:
    """Training runs, the newest first, each once whatever links point to it."""
    files = [path for depth in ("*/*", "*/*/*") for path in outputs.glob(f"{depth}/{CONFIG}")]
    return sorted({path.parent.resolve() for path in files}, key=lambda run: _age(run / CONFIG))


def short(path: Path, folders: Iterable[Path]) -> str:
    """A path as people call it: below the folder that it was found in."""
    for folder in folders:
        if path.is_relative_to(folder.resolve()):
            return str(path.relative_to(folder.resolve()))
    return str(path)
