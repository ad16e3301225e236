"""What became of every run: read from its folder, whatever state that is in, and without disturbing it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from atlas_lm.config.parsing import CONFIG, is_number, read_config
from atlas_lm.runs.folder import job_of
from atlas_lm.runs.job import still_known
from atlas_lm.runs.lock import is_held

RUNNING, KILLED, NOT_BEGUN = "running", "killed", "not begun"  # what has no report; the others are a report's words
QUEUED = "queued"  # one of a job that SLURM starts again
TAIL = 64 * 1024  # bytes of the end of metrics.jsonl: many lines


class Entry(NamedTuple):
    """One run; None where its folder does not say."""

    folder: Path
    state: str  # finished, stopped early, interrupted, failed, running, killed, not begun, queued
    step: int | None
    steps: int | None  # of the whole run
    loss: float | None  # of validation, nats per token; of training where none is known
    is_validation: bool
    tokens_per_second: float | None
    age: float | None  # seconds since its last record, or its end
    error: str | None


def examine(folder: Path, now: float | None = None) -> Entry:
    """One run folder. What is broken in it is None here; it is not this command that refuses it."""
    now = time.time() if now is None else now
    report, records = _report(folder), _tail(folder / "metrics.jsonl")
    newest = records[-1] if records else {}
    validation = next((found for row in reversed(records) if (found := _number(row.get("val/loss"))) is not None), None)
    training = next((found for row in reversed(records) if (found := _number(row.get("lm_loss"))) is not None), None)
    if (loss := _number(report.get("val_loss"))) is not None:
        validation = loss
    # a run that is resumed has withdrawn its report, and one that is being written to may have an old one
    held = is_held(folder)
    state = report.get("status") if not held else RUNNING
    if not isinstance(state, str):
        state = KILLED if records or _has_checkpoint(folder) else NOT_BEGUN
    last = _number(newest.get("time"))
    if last is None:
        last = _changed(folder)
    return Entry(
        folder,
        state,
        _whole(report.get("steps") if newest.get("global_step") is None else newest["global_step"]),
        _whole(_steps(folder)),
        training if validation is None else validation,
        validation is not None,
        _number(report.get("tokens_per_second")) or _number(newest.get("tokens_per_second")),
        None if last is None else max(0.0, now - last),
        report.get("error") if isinstance(report.get("error"), str) else None,
    )


def with_queue(entries: Sequence[Entry]) -> list[Entry]:
    """The same, where SLURM still has the job of a run that stands still: it is queued. SLURM is asked as long as it
    answers."""
    found, answers = [], True
    for entry in entries:
        job = job_of(entry.folder) if answers and entry.state in (KILLED, NOT_BEGUN, "interrupted", "failed") else None
        if job is not None and job.startswith("slurm-"):
            known = still_known(job)
            answers = known is not None
            entry = entry._replace(state=QUEUED) if known else entry
        found.append(entry)
    return found


def _report(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file that another process may be writing to."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the first was cut, the last is being written
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _steps(folder: Path) -> Any:
    try:
        return OmegaConf.select(read_config(folder / CONFIG), "optim.total_steps")
    except Exception:  # whatever is wrong with it
        return None


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.ckpt"))


def _changed(folder: Path) -> float | None:
    try:
        return (folder / CONFIG).stat().st_mtime
    except OSError:
        return None


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) else None
