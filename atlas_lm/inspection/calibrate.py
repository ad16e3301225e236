"""Thresholds of one model from clean text, so that flags and their false alarms are that model's own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from atlas_lm.inspection.health import Thresholds, unusual
from atlas_lm.inspection.schema import Report
from atlas_lm.inspection.summary import numbers, summary_of

ROUNDS = 1.4826  # standard deviations in a median absolute deviation
TAILS = 2.563  # standard deviations between the quantiles 0.1 and 0.9 of a normal distribution
SMALLEST = 0.05  # of a figure's median: its standard deviation at least
QUANTILE = 0.99  # of clean texts that raise no flag, each flag by itself


def calibrate(reports: Sequence[Report], quantile: float = QUANTILE) -> Thresholds:
    """Thresholds from generations or readings of clean text: each flag is silent on `quantile` of them.

    Medians and deviations come from one half; the threshold on the largest deviations holds for the other too.
    ValueError:
    fewer than 8.
    """
    if len(reports) < 8:
        raise ValueError(f"{len(reports)} clean texts are too few to take quantiles of: give at least 8")
    if not 0.5 <= quantile < 1:
        raise ValueError(f"quantile={quantile} must be in [0.5, 1)")
    summaries = [summary_of(report) for report in reports]

    def at(name: str, q: float = quantile) -> list[float]:
        values = sorted(numbers(s.get(name) for s in summaries))
        return [] if not values else [_quantile(values, q)]

    base = Thresholds()
    entropies = sorted(x for r in reports for x in numbers(r.steps.entropy_bits))
    bits = _quantile(entropies, quantile) if entropies else base.high_entropy_bits
    shares = sorted(_share_above(r, bits) for r in reports)
    found: dict[str, Any] = {
        "high_entropy_bits": bits,
        "high_entropy_share": max(_quantile(shares, quantile), 0.01),
        "collapsed_share": max([*at("collapsed_share"), 0.0]),
        "mid_layer_ratio": max([*at("mid_layer_ratio"), 1.0]) * 1.25,
    }
    if labels := reports[0].memory.labels:
        keys = [label.replace(" ", "_") for label in labels]
        low = [x for key in keys for x in at(f"{key}_output_ratio", 1 - quantile)]
        found["silent_ratio"] = min(low) / 2 if low else base.silent_ratio
        found["diverging_change"] = 2 * max([x for key in keys for x in at(f"{key}_largest_change")], default=0.25)
        found["diverging_norm"] = 2 * max([x for key in keys for x in at(f"{key}_weight_norm")], default=math.inf)
        shares_of = [x for key in keys for n in ("saturated_gates", "radius_share") for x in at(f"{key}_{n}")]
        found["saturated_share"] = min(1.0, 0.05 + max(shares_of, default=0.9))
    thresholds = base.model_copy(update=found)
    return _with_usual(thresholds, summaries, quantile)


def _share_above(report: Report, bits: float) -> float:
    found = numbers(report.steps.entropy_bits)
    return sum(x > bits for x in found) / max(1, len(found))


def _with_usual(thresholds: Thresholds, summaries: list[dict[str, float | None]], quantile: float) -> Thresholds:
    half = summaries[::2]
    names = [name for name in half[0] if all(s.get(name) is not None for s in summaries)]
    centre, scale = {}, {}
    for name in names:
        values = [float(s[name] or 0.0) for s in half]
        centre[name] = statistics.median(values)
        spread = ROUNDS * statistics.median(abs(x - centre[name]) for x in values)
        ordered = sorted(values)
        tails = (_quantile(ordered, 0.9) - _quantile(ordered, 0.1)) / TAILS
        # a figure that clean text hardly changes would find any other text impossible
        scale[name] = max(spread, tails, SMALLEST * abs(centre[name]), 1e-3)
    usual = thresholds.model_copy(update={"centre": centre, "scale": scale})
    halves = [sorted(x for s in part if (x := unusual(s, usual)) is not None) for part in (half, summaries[1::2])]
    return usual.model_copy(update={"unusual": 1.1 * max(_quantile(scores, quantile) for scores in halves)})


def _quantile(ordered: Sequence[float], q: float) -> float:
    """With linear interpolation between neighbours."""
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
