"""The seed's criteria of success by epoch, looked up in what a run has logged; reported, passed or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DROP = 0.1  # of the cosine from its best that is a collapse
LOGGED = {  # what a criterion is about → the metric
    "val cosine": "val/cosine", "train cosine": "train/cosine", "margin": "five_cat_probe/margin_seen",
    "peak": "five_cat_probe/peak_seen", "R@5": "val/recall_at_5",
}  # fmt: skip
FINAL = 0  # the last epoch
# by head: epoch → what it is about and at least how much
DIRECT = {3: {"val cosine": 0.50, "train cosine": 0.48, "peak": 1.0, "R@5": 0.90}}
RESIDUAL = {
    1: {"val cosine": 0.48},
    3: {"val cosine": 0.50, "margin": 0.06, "peak": 1.0, "R@5": 0.88},
    6: {"val cosine": 0.52, "margin": 0.08, "peak": 1.0, "R@5": 0.92},
    FINAL: {"val cosine": 0.54, "margin": 0.10, "peak": 1.0, "R@5": 0.95},
}


class Criterion(NamedTuple):
    """One of them, as a run met it."""

    epoch: int
    name: str
    wanted: float
    found: float | None  # None: the run has not logged it, or did not come so far
    passed: bool


def by_epoch(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Epoch, 1 the first → the last value of each metric that the criteria are about."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.get("epoch") is None:
            continue
        epoch = found.setdefault(int(row["epoch"]) + 1, {})
        epoch.update({name: float(row[metric]) for name, metric in LOGGED.items() if row.get(metric) is not None})
    return found


def judge(rows: Sequence[Mapping[str, Any]], head: str) -> list[Criterion]:
    """Every criterion of the head, P1's of `direct` and P2's of `residual`; `rows` are those of metrics.jsonl."""
    epochs = by_epoch(rows)
    whole = [epoch for epoch, values in epochs.items() if "margin" in values]  # the last one may have been cut short
    last = max(whole or epochs, default=0)
    found = []
    for epoch, wanted in (RESIDUAL if head == "residual" else DIRECT).items():
        at = epochs.get(epoch or last, {})
        for name, least in wanted.items():
            value = at.get(name)
            holds = value is not None and (value == least if name == "peak" else value >= least)
            found.append(Criterion(epoch or last, name, least, value, holds))
    cosines = [epochs[e]["val cosine"] for e in sorted(epochs) if "val cosine" in epochs[e]]
    fall = max((max(cosines[: i + 1]) - c for i, c in enumerate(cosines)), default=None)
    found.append(Criterion(last, "fall of the val cosine, at most", DROP, fall, fall is not None and fall < DROP))
    return found
