"""Telemetry as one JSON object per logged step (C9).

Lightning logs training metrics, validation metrics and those of callbacks in separate calls; all calls of one step
become one line. A line is written when the next step begins, when a checkpoint is about to be written, or when the run
ends or fails, and never changed. A resumed run continues after the step of its checkpoint: what a process that died had
written beyond it comes again, so it is moved to `metrics.cut.jsonl` beside the file.

A rollback makes the optimizer's steps go back, a file does not. Three columns keep them apart: `step` is Lightning's
logging step and only grows; `global_step` counts the optimizer steps of this timeline and goes back at a rollback;
`timeline` counts the rollbacks. `seq` numbers the lines of the file, over all runs that wrote to it.
"""

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from atlas_lm.config.parsing import check_numbers, is_number
from atlas_lm.files import write_atomically

# The fields of C9 and the names under which their values are logged; null in a step that did not log one.
FIELDS = {
    "lm_loss": "train/loss",
    "perplexity": "train/ppl",
    "ppl_delta": "spike_rollback/ppl_delta",
    "gate_mean": "gate_monitor/mean",
    "gate_std": "gate_monitor/std",
    "gate_polarised": "gate_monitor/polarised",
    "niah_accuracy": "niah_probe/accuracy",
    "chunk_size": "chunk_size_scheduler/chunk_size",
    "clip_threshold": "optim/clip_threshold",
    "grad_norm": "optim/grad_norm",
    "tokens_per_second": "perf/tokens_per_second",
    "rollback_count": "spike_rollback/rollbacks",
}
NOT_YET = {"spike_rollback/ema"}  # metrics of a healthy run that are NaN at first: there is nothing before to average
FORMER_NAMES = {  # of version 0.1, and those of now, which begin with the name of the callback's file
    "guard/skipped_steps": "nonfinite_guard/skipped_steps",
    "guard/outliers": "outlier_guard/outliers",
    "guard/corruptions": "weight_integrity/corruptions",
    "memory/contribution": "memory_contribution/perplexity_rise",
    "memory/gate_mean": "gate_monitor/mean",
    "memory/gate_std": "gate_monitor/std",
    "memory/gate_polarised": "gate_monitor/polarised",
    "memory/chunk_size": "chunk_size_scheduler/chunk_size",
}
FORMER_PREFIXES = {
    "niah/": "niah_probe/",
    "spike/": "spike_rollback/",
    "loss_weight/": "loss_weight_schedule/",
    "clip/": "proactive_clipping/",
}
GLOBAL_STEP, TIMELINE = "train/global_step", "spike_rollback/timeline"


def row(step: int, seconds: float, metrics: Mapping[str, float], seq: int = 0, timeline: int = 0) -> dict[str, Any]:
    """One line: seq, step, global_step, timeline, time (Unix seconds), the fields of C9, then every metric by its name.

    `timeline` holds where the metrics name none. What is no finite number becomes null and its name goes into
    `nonfinite`: NaN is not JSON.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    done, logged = finite.get(GLOBAL_STEP), finite.get(TIMELINE)
    place = {
        "seq": seq,
        "step": step,
        "global_step": None if done is None else int(done),
        "timeline": timeline if logged is None else int(logged),
    }
    fields = {field: finite.get(name) for field, name in FIELDS.items()}
    nonfinite = [name for name, value in finite.items() if value is None]
    return {**place, "time": seconds, **fields, **finite, **({"nonfinite": nonfinite} if nonfinite else {})}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl in the order in which they were written; [] for an empty file.

    A crash leaves half a line: as the last one, or, where a later run continued, in the middle with no `seq` missing
    around it. Both are passed over. ValueError with the line number for any other line that is no row; OSError where
    there is no file.
    """
    rows: list[dict[str, Any]] = []
    broken: int | None = None  # line number of what is no row, until the row after it says why
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        found = _parse(line)
        if found is None:
            broken = broken or number
            continue
        if broken and found.get("seq") != _next_seq(rows):
            raise ValueError(f"{path}, line {broken}: no JSON object, and rows follow it: restore or delete that line")
        broken = None
        found = {current_name(name): value for name, value in found.items()}
        _check_row(found, f"{path}, line {number}")
        rows.append(found)
    return rows


def current_name(metric: str) -> str:
    """The name that a metric has now."""
    prefix = next((former for former in FORMER_PREFIXES if metric.startswith(former)), "")
    return FORMER_NAMES.get(metric, FORMER_PREFIXES.get(prefix, "") + metric[len(prefix) :])


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """ValueError unless all values are numbers or null, but for the list of names `nonfinite`."""
    names = row.get("nonfinite", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: nonfinite is {names!r} and must be a list of names: restore or delete that line")
    for name in ("seq", "step"):
        if name in row and not is_number(row[name]):
            raise ValueError(f"{where}: {name} is {row[name]!r} and must be a number: restore or delete that line")
    check_numbers(row, (name for name in row if name != "nonfinite"), where)


def _next_seq(rows: list[dict[str, Any]]) -> int:
    """The number that follows the last row's; rows of files without numbers count as their position."""
    return int(rows[-1].get("seq", len(rows) - 1)) + 1 if rows else 0


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row on a line; None where it is no whole row."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # of json, of what is no UTF-8, and of brackets without end
        return None
    return found if isinstance(found, dict) else None


def _resume(path: Path) -> tuple[int, int]:
    """The next `seq` of a file, and the timeline of its last whole row."""
    rows = [found for line in path.read_bytes().splitlines() if (found := _parse(line))] if path.exists() else []
    return _next_seq(rows), int(rows[-1].get("timeline") or 0) if rows else 0


class JsonlLogger(Logger):
    """Appends to `path`; only rank zero writes. A file that a killed run left is continued."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._step: int | None = None
        self._metrics: dict[str, float] = {}
        self._seq: int | None = None  # of the next line; None until the file has been looked at
        self._timeline = 0
        self._cut_at: int | None = None

    @property
    def name(self) -> str:
        """Distinguishes loggers in Lightning's messages."""
        return "jsonl"

    @property
    def version(self) -> str:
        """None but the run folder's."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "JsonlLogger":
        """Itself: there is no other object to log to."""
        return self

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Collect the metrics of a step; a new step writes the one before."""
        step = 0 if step is None else step
        if step != self._step:
            self.write()
            self._step = step
        self._metrics.update({name: float(value) for name, value in metrics.items()})

    @rank_zero_only
    def resume_from_step(self, step: int) -> None:
        """Before the next row is written, rows of `step` and later move out of the file: they come again."""
        self._cut_at = step

    def _cut(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept: list[bytes] = []
        cut: list[bytes] = []
        for line in self.path.read_bytes().splitlines():
            found = _parse(line)
            done = found is not None and isinstance(found.get("step"), int) and found["step"] < step
            (kept if done else cut).append(line)
        if cut:
            for line in cut:
                _append(self.path.with_name(f"{self.path.stem}.cut{self.path.suffix}"), line.decode("utf-8", "replace"))
            write_atomically(self.path, "".join(line.decode() + "\n" for line in kept))

    @rank_zero_only
    def flush(self) -> None:
        """Everything that was logged so far is on disk, also after a power cut."""
        self.write()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last step, also when the run failed."""
        self.write()

    def write(self) -> None:
        """Append the collected step, if any, in one call, so that no reader meets half a line."""
        if self._step is None or not self._metrics:
            return
        if self._cut_at is not None:
            self._cut(self._cut_at)
            self._cut_at, self._seq = None, None
        if self._seq is None:
            self._seq, self._timeline = _resume(self.path)
        found = row(self._step, time.time(), self._metrics, self._seq, self._timeline)
        self._metrics = {}
        _append(self.path, json.dumps(found, allow_nan=False))
        self._seq, self._timeline = self._seq + 1, found["timeline"]


def _append(path: Path, line: str) -> None:
    """Append a line, on a new one where the last was left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + line.encode() + b"\n"
        while data:  # one call, but for a disk that fills up: the next call then says so
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)
