"""Health flags: what the columns of a report say about the generation. Every threshold is a field.

The judgements are functions of plain numbers. Defaults are those of the seeds' plan; `calibrate` replaces them by
quantiles over clean text of the same model, which is what they should be used with.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from atlas_lm.inspection.schema import Flag, MemoryColumns, Report
from atlas_lm.inspection.summary import largest, mid_layer_ratios

LARGEST = 3  # deviations that `unusual` is the mean of


class Thresholds(BaseModel):
    """Where flags begin."""

    # a model without a memory has no bound on its norm, and ∞ as null would not be read back
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    high_entropy_bits: float = 4.0
    """Bits above which a step counts as one of high entropy."""
    high_entropy_share: float = 0.5
    """Share of such steps above which the flag is raised."""
    collapsed_share: float = 0.7
    """Share of heads that see one key, the mean over layers and steps."""
    repetition_cosine: float = 0.9
    """Of hidden states at the lag of a loop, from which on it is one; tokens alone decide where there are none."""
    mid_layer_ratio: float = 5.0
    """Norm of a layer in the middle third ÷ the mean of the first third, in the same step."""
    silent_ratio: float = 0.01
    """Memory's ÷ attention's output below which a memory is silent."""
    silent_change: float = 0.0
    """Change of W per token, ‖ΔW‖ ÷ ‖W‖, up to which a memory is silent over as many tokens as it writes at a time."""
    saturated_share: float = 0.9
    """Of the bound on fast weights, or of fusion gates, above which a memory is saturated."""
    diverging_change: float = 0.5
    """Change of W per token above which a memory diverges."""
    diverging_norm: float = math.inf
    """‖W − W_init‖ above which it does."""
    centre: dict[str, float] = {}
    """Median of each figure of the summary over clean text."""
    scale: dict[str, float] = {}
    """Its median absolute deviation, in standard deviations."""
    unusual: float = math.inf
    """Mean of the three largest deviations from them above which a generation is unusual."""


def read_thresholds(path: Path) -> Thresholds:
    """Of a file that `python -m atlas_lm inspect calibrate` wrote. ValueError: there is none, or it holds none."""
    try:
        return Thresholds.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"thresholds={path}: there is no such file; inspect calibrate writes one") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"thresholds={path} cannot be read ({str(error).splitlines()[0]}): calibrate again") from error


def deviations(summary: dict[str, float | None], thresholds: Thresholds) -> dict[str, float]:
    """How many standard deviations each figure lies from the clean text's median."""
    return {
        name: abs(value - thresholds.centre[name]) / thresholds.scale[name]
        for name, value in summary.items()
        if value is not None and name in thresholds.centre
    }


def unusual(summary: dict[str, float | None], thresholds: Thresholds) -> float | None:
    """The mean of the largest deviations, of the figures that are there: a capture of some layers has fewer."""
    found = sorted(deviations(summary, thresholds).values(), reverse=True)[:LARGEST]
    return statistics.fmean(found) if found else None


def flags_of(report: Report, thresholds: Thresholds) -> list[Flag]:
    """Every flag, fired or not. `report.summary` is there; its flags need not be."""
    found = [
        _nonfinite(report),
        _high_entropy(report, thresholds),
        _collapse(report, thresholds),
        _repetition(report, thresholds),
        _mid_layer(report, thresholds),
    ]
    if report.memory.labels:
        found += [_silent(report, thresholds), _saturated(report, thresholds), _diverging(report, thresholds)]
    value = unusual(report.summary, thresholds)
    if value is not None:
        far = sorted(deviations(report.summary, thresholds).items(), key=lambda item: -item[1])[:LARGEST]
        named = ", ".join(f"{name} ({by:.1f} σ)" for name, by in far)
        message = f"far from clean text: {named}"
        found.append(_flag("unusual", value, thresholds.unusual, [], message))
    return found


def _flag(name: str, value: float | None, threshold: float, steps: list[int], message: str) -> Flag:
    fired = value is not None and value > threshold
    return Flag(
        name=name, fired=fired, value=value, threshold=threshold, steps=steps if fired else [],
        message=message if fired else "",
    )  # fmt: skip


def _nonfinite(report: Report) -> Flag:
    of_layers = {s for s, row in zip(report.layers.steps, report.layers.nonfinite, strict=False) if any(row)}
    of_logits = {i for i, x in enumerate(report.steps.entropy_bits) if x is None and report.steps.has_logits(i)}
    steps = sorted(of_layers | of_logits)
    in_prompt = any(report.prompt.nonfinite)
    first = next((report.settings.layers[n] for row in report.layers.nonfinite for n, x in enumerate(row) if x), None)
    where = "in the prompt" if in_prompt and not steps else "" if first is None else f", first in layer {first}"
    return _flag("nonfinite", float(len(steps) + in_prompt), 0.0, steps, f"NaN or infinite{where}")


def _high_entropy(report: Report, t: Thresholds) -> Flag:
    steps = [i for i, x in enumerate(report.steps.entropy_bits) if x is not None and x > t.high_entropy_bits]
    captured = sum(map(report.steps.has_logits, range(len(report.steps.entropy_bits))))
    share = len(steps) / max(1, captured)
    message = f"{len(steps)} of {captured} steps above {t.high_entropy_bits:g} bits"
    return _flag("high_entropy", share, t.high_entropy_share, steps, message)


def _collapse(report: Report, t: Thresholds) -> Flag:
    share = report.summary.get("collapsed_share")
    message = f"{share or 0:.0%} of heads see one key: many models have some, fitted thresholds know how many"
    return _flag("attention_collapse", share, t.collapsed_share, [], message)


def _repetition(report: Report, t: Thresholds) -> Flag:
    columns = report.steps
    steps = [
        i
        for i, (period, cosine) in enumerate(zip(columns.repetition_period, columns.repetition_cosine, strict=True))
        if period and (cosine is None or cosine >= t.repetition_cosine)
    ]
    tokens = max((columns.repetition_tokens[i] for i in steps), default=0)
    period = columns.repetition_period[steps[0]] if steps else 0
    loop = f"a loop of {period} token{'s' * (period != 1)}"
    message = f"{loop} from step {steps[0] if steps else 0} on, {tokens} tokens long"
    return _flag("repetition", float(tokens), 0.0, steps, message)


def _mid_layer(report: Report, t: Thresholds) -> Flag:
    ratios = mid_layer_ratios(report.layers.norm)
    rows = zip(report.layers.steps, ratios, strict=False)
    steps = [s for s, ratio in rows if ratio is not None and ratio > t.mid_layer_ratio]
    value = largest(ratios)
    return _flag("mid_layer_anomaly", value, t.mid_layer_ratio, steps, f"{value or 0:.1f} times the first layers' norm")


def _of_memories(report: Report, name: str, pick: Any) -> tuple[float | None, str]:
    """The extreme over memories, and which it is."""
    found = {label: report.summary.get(f"{label.replace(' ', '_')}_{name}") for label in report.memory.labels}
    there = {label: value for label, value in found.items() if value is not None}
    if not there:
        return None, ""
    label = pick(there, key=there.__getitem__)
    return there[label], label


def _silent(report: Report, t: Thresholds) -> Flag:
    ratio, label = _of_memories(report, "output_ratio", min)
    quiet = ratio is not None and ratio < t.silent_ratio
    still = frozen(report.memory, t.silent_change)
    message = f"{label} answers {ratio or 0:.3g} of what attention does" if quiet else f"{', '.join(still)}: no write"
    return Flag(
        name="memory_silent", fired=quiet or bool(still), value=0.0 if still and not quiet else ratio,
        threshold=t.silent_change if still and not quiet else t.silent_ratio,
        message=message if quiet or still else "",
    )  # fmt: skip


def frozen(memory: MemoryColumns, most: float) -> list[str]:
    """The memories that changed by no more than `most` a token over the last tokens, so many that one write was due."""
    found = []
    for n, (label, chunk) in enumerate(zip(memory.labels, memory.chunks, strict=False)):
        tokens = 0
        for row in range(len(memory.steps) - 1, 0, -1):
            change = memory.relative_change[row][n]
            if change is None or change > most:
                break
            tokens += memory.steps[row] - memory.steps[row - 1]
            if tokens >= chunk:
                found.append(label)
                break
    return found


def _saturated(report: Report, t: Thresholds) -> Flag:
    radius, label = _of_memories(report, "radius_share", max)
    gates, of_gates = _of_memories(report, "saturated_gates", max)
    if (gates or 0) > (radius or 0):
        return _flag("memory_saturated", gates, t.saturated_share, [], f"{gates or 0:.0%} of gates of {of_gates}")
    message = f"the weights of {label} are at {radius or 0:.0%} of their bound"
    return _flag("memory_saturated", radius, t.saturated_share, [], message)


def _diverging(report: Report, t: Thresholds) -> Flag:
    memory = report.memory
    lost = [s for s, row in zip(memory.steps, memory.weight_norm, strict=True) if any(x is None for x in row)]
    if lost:
        return Flag(name="memory_diverging", fired=True, value=None, threshold=t.diverging_change, steps=lost,
                    message="fast weights are not finite")  # fmt: skip
    norm, label = _of_memories(report, "weight_norm", max)
    if norm is not None and norm > t.diverging_norm:
        return _flag("memory_diverging", norm, t.diverging_norm, memory.steps, f"‖W − W_init‖ of {label} is {norm:.3g}")
    rows = zip(memory.steps, memory.relative_change, strict=True)
    steps = [s for s, row in rows if (largest(row) or 0) > t.diverging_change]
    value, label = _of_memories(report, "largest_change", max)
    return _flag("memory_diverging", value, t.diverging_change, steps, f"{label} changes by {value or 0:.2g} a token")
