"""One number for each thing that a report measured: what is judged, calibrated, compared and tried as a score."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

from atlas_lm.inspection.schema import Column, MemoryColumns, Report, Table


def numbers(values: Iterable[float | None]) -> list[float]:
    """Those that are there."""
    return [x for x in values if x is not None]


def mean(values: Iterable[float | None]) -> float | None:
    found = numbers(values)
    return statistics.fmean(found) if found else None


def largest(values: Iterable[float | None]) -> float | None:
    return max(numbers(values), default=None)


def mid_layer_ratios(norms: Table) -> Column:
    """Per step: the largest norm in the middle third of layers ÷ the mean of the first third; None under 3 layers.

    ∞ where the middle is not finite and the beginning is.
    """
    found: Column = []
    for row in norms:
        third = len(row) // 3
        early, middle = numbers(row[:third]), row[third : len(row) - third]
        if not early or third < 1:
            found.append(None)
        elif any(x is None for x in middle):
            found.append(math.inf)
        else:
            found.append(max(numbers(middle)) / max(statistics.fmean(early), 1e-30))
    return found


def summary_of(report: Report) -> dict[str, float | None]:
    """One number for each thing that was measured: what is calibrated, compared and tried as a score."""
    steps, layers, prompt = report.steps, report.layers, report.prompt
    heads = max(1, report.model.heads)
    found: dict[str, float | None] = {
        "mean_entropy_bits": mean(steps.entropy_bits),
        "max_entropy_bits": largest(steps.entropy_bits),
        "mean_surprisal_bits": mean(steps.surprisal_bits),
        "max_surprisal_bits": largest(steps.surprisal_bits),
        "mean_margin": mean(steps.margin),
        "mean_top_k_mass": mean(steps.top_k_mass),
        "repetition_tokens": largest(map(float, steps.repetition_tokens)),
        "prompt_surprisal_bits": mean(prompt.surprisal_bits),
        "prompt_basin": mean(x for row in prompt.basin for x in row),
        "prompt_transformation": mean(prompt.transformation),
        "attention_entropy_bits": mean(x for row in layers.entropy_mean for x in row),
        "attention_concentration": mean(x for row in layers.concentration_mean for x in row),
        "collapsed_share": _share(layers.collapsed, heads),
        "focused_share": _share(layers.focused, heads),
        "mid_layer_ratio": largest(mid_layer_ratios(layers.norm)),
    }
    for name, third in _thirds(layers.norm).items():
        found[f"{name}_norm_log2"] = third
    return {**found, **_summary_of_memory(report.memory)}


def _share(table: Table, heads: int) -> float | None:
    found = mean(x for row in table for x in row)
    return None if found is None else found / heads


def _thirds(norms: Table) -> dict[str, float | None]:
    """The mean logarithm of norms in the first, middle and last third of the layers."""
    third = max(1, len(norms[0]) // 3) if norms else 1
    cuts = {"early": slice(0, third), "middle": slice(third, -third), "late": slice(-third, None)}
    return {name: mean(math.log2(x) for row in norms for x in numbers(row[cut]) if x > 0) for name, cut in cuts.items()}


def _summary_of_memory(memory: MemoryColumns) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for n, label in enumerate(memory.labels):
        key = label.replace(" ", "_")
        for name in (
            "weight_norm",
            "write_strength",
            "output_ratio",
            "saturated_gates",
            "radius_share",
            "effective_rank",
        ):
            found[f"{key}_{name}"] = mean(row[n] for row in getattr(memory, name))
        # of the logarithm: half-lives of gates that are nearly shut differ by orders of magnitude
        found[f"{key}_half_life_log2"] = mean(
            math.log2(x) for x in numbers(row[n] for row in memory.half_life) if x > 0
        )
        found[f"{key}_relative_change"] = mean(row[n] for row in memory.relative_change)
        found[f"{key}_largest_change"] = largest(row[n] for row in memory.relative_change)
        found[f"{key}_norm_drop"] = largest_drop([row[n] for row in memory.weight_norm])
        for lag, tokens in enumerate(memory.lags):
            name = "residual_now" if tokens == 0 else f"residual_{tokens}_tokens_ago"
            found[f"{key}_{name}"] = mean(row[n][lag] for row in memory.residual if row)
    return found


def largest_drop(norms: Sequence[float | None]) -> float | None:
    """The largest fall from one row to the next, as a share: 1 where everything was lost."""
    found = numbers(norms)
    return max((1 - b / a for a, b in itertools.pairwise(found) if a > 0), default=None)
