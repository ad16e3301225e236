"""What the dashboard draws of a training run, from the rows of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atlas_lm.loggers.jsonl import NOT_YET

Row = dict[str, Any]

CHARTS = {  # title → the metrics that share an axis
    "loss (nats per token)": ("train/loss", "val/loss"),
    "needle (cosine)": ("niah_probe/accuracy", "niah_probe/control", "niah_probe/retained"),
    "context gain (nats per token)": ("memory_horizon/gain", "memory_horizon/gain_low", "memory_horizon/gain_high"),
    "horizon (tokens)": ("memory_horizon/horizon",),
    "gates": ("gate_monitor/mean", "gate_monitor/std", "gate_monitor/polarised"),
    "spikes: rise of the held-out perplexity": ("spike_rollback/ppl_delta", "spike_rollback/threshold"),
    "gradient norm": ("optim/grad_norm", "optim/clip_threshold"),
    "tokens per second": ("perf/tokens_per_second",),
    "chunk size (tokens)": ("chunk_size_scheduler/chunk_size",),
    "learning rate": ("optim/lr",),
}
COUNTERS = {  # that only grow; each growth is an event
    "spike_rollback/count": "spike",
    "spike_rollback/rollbacks": "rollback",
    "nonfinite_guard/skipped_steps": "step skipped: not finite",
    "outlier_guard/outliers": "step skipped: outlier",
    "weight_integrity/corruptions": "weights changed outside the optimizer",
}


def series(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Row]:
    """Points of these metrics over the logging step, which no rollback sets back; without what names share."""
    ends = [name.rpartition("/")[2] for name in names]
    short = dict(zip(names, ends if len(set(ends)) == len(ends) else names, strict=True))
    return [
        {"step": row["step"], "metric": short[name], "value": row[name], "timeline": row.get("timeline", 0)}
        for row in rows
        for name in names
        if row.get(name) is not None and row.get("step") is not None
    ]


def charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Title → points, of the charts for which the run has any."""
    found = {title: series(rows, names) for title, names in CHARTS.items()}
    return {title: points for title, points in found.items() if points}


def events(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Spikes, rollbacks, skipped steps and metrics that were no number, with the step at which each was logged."""
    found: list[Row] = []
    before = dict.fromkeys(COUNTERS, 0.0)
    for row in rows:
        for name, event in COUNTERS.items():
            value = row.get(name)
            if value is None:
                continue
            if value > before[name]:
                found.append({"step": row.get("step"), "event": event, "so far": int(value)})
            before[name] = value
        names = [name for name in row.get("nonfinite", []) if name not in NOT_YET]
        if names:
            found.append({"step": row.get("step"), "event": f"not finite: {', '.join(names)}", "so far": None})
    return found
