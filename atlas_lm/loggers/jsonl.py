"""Telemetry as one JSON object per logged step (SPEC C9).

Lightning logs training metrics, validation metrics and those of callbacks in separate calls; all calls of one step
become one line. A line is written when the next step begins, or when the run ends or fails, and never changed.
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

# The fields of SPEC C9 and the names under which their values are logged; null in a step that did not log one.
FIELDS = {
    "lm_loss": "train/loss",
    "perplexity": "train/ppl",
    "ppl_delta": "spike/ppl_delta",
    "gate_mean": "memory/gate_mean",
    "gate_std": "memory/gate_std",
    "gate_polarised": "memory/gate_polarised",
    "niah_accuracy": "niah/accuracy",
    "chunk_size": "memory/chunk_size",
    "clip_threshold": "optim/clip_threshold",
    "grad_norm": "optim/grad_norm",
    "tokens_per_second": "perf/tokens_per_second",
    "rollback_count": "spike/rollbacks",
}


def row(step: int, seconds: float, metrics: Mapping[str, float]) -> dict[str, Any]:
    """One line: step, time (Unix seconds), the fields of C9, then every metric by its own name.

    What is no finite number becomes null and its name goes into `nonfinite`: NaN is not JSON.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    fields = {field: finite.get(name) for field, name in FIELDS.items()}
    nonfinite = [name for name, value in finite.items() if value is None]
    return {"step": step, "time": seconds, **fields, **finite, **({"nonfinite": nonfinite} if nonfinite else {})}


class JsonlLogger(Logger):
    """Appends to `path`; only rank zero writes."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._step: int | None = None
        self._metrics: dict[str, float] = {}

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
    def finalize(self, status: str) -> None:
        """Write the last step, also when the run failed."""
        self.write()

    def write(self) -> None:
        """Append the collected step, if any, in one call, so that no reader meets half a line."""
        if self._step is None or not self._metrics:
            return
        line = json.dumps(row(self._step, time.time(), self._metrics), allow_nan=False) + "\n"
        self._metrics = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
