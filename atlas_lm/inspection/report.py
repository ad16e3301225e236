"""From a trace to a report: names, summary, baselines and flags."""

from __future__ import annotations

import json
import math
import statistics
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from atlas_lm.inspection import health, summary
from atlas_lm.inspection.capture import Plan, Trace
from atlas_lm.inspection.health import Thresholds
from atlas_lm.inspection.schema import Baselines, Latency, ModelInfo, Prompt, Report, Settings


def build(
    trace: Trace, model: ModelInfo, plan: Plan, names: Callable[[Sequence[int]], list[str]], text: str,
    thresholds: Thresholds, version: str,
) -> Report:  # fmt: skip
    """`names`: the text of each token id. `text`: what was generated."""
    steps = trace.steps
    steps.tokens = names(steps.token_ids)
    steps.top_tokens = [names([int(i) for i in row]) for row in steps.top_tokens]
    prompt = trace.prompt if trace.prompt is not None else Prompt(text="", tokens=[])
    # as a file gives them back: what is not finite is None, and no judgement takes NaN for a number
    parts = [part.model_dump() for part in (prompt, steps, trace.layers, trace.cross, trace.memory)]
    report = Report.model_validate(
        {
            **dict(zip(("prompt", "steps", "layers", "cross", "memory"), parts, strict=True)),
            "id": uuid.uuid4().hex, "created": datetime.now(UTC).isoformat(timespec="seconds"), "version": version,
            "model": model, "text": text, "latency": latency_of(trace), "baselines": baselines_of(trace),
            "settings": Settings(
                capture=plan.capture,  # type: ignore[arg-type]  # Plan has checked it
                layers=plan.chosen(model.layers) if plan.every else [], every=plan.every, tokens=plan.tokens,
                temperature=plan.temperature, top_k=plan.top_k, top_p=plan.top_p, seed=plan.seed,
            ),
            "summary": {}, "flags": [], "warnings": trace.warnings,
        }
    )  # fmt: skip
    report.summary = {name: value if value is None or math.isfinite(value) else None
                      for name, value in summary.summary_of(report).items()}  # fmt: skip
    report.flags = health.flags_of(report, thresholds)
    report.thresholds = json.loads(thresholds.model_dump_json())  # ∞ as text
    return report


def baselines_of(trace: Trace) -> Baselines:
    """Scores that one pass gives for nothing (LM-Polygraph's): every other score has to beat them."""
    bits = summary.numbers(trace.steps.surprisal_bits)
    entropies = summary.numbers(trace.steps.entropy_bits)
    if not bits:
        return Baselines()
    return Baselines(
        # of the whole text, or of nothing: a sum over a sample of its tokens is no probability of it
        sequence_log2_probability=-sum(bits) if len(bits) == len(trace.steps.token_ids) else None,
        perplexity=2 ** statistics.fmean(bits),
        mean_entropy_bits=summary.mean(entropies), max_entropy_bits=summary.largest(entropies),
    )  # fmt: skip


def latency_of(trace: Trace) -> Latency:
    """Seconds, by what they were spent on: the steps overlap nothing, so the parts add up to the total."""
    waits = summary.numbers(trace.steps.latency_seconds)
    forward = sum(summary.numbers(trace.steps.forward_seconds[1:]))  # the first pass is the prompt's
    capture = sum(summary.numbers(trace.steps.capture_seconds))
    named = trace.prompt_seconds + forward + capture
    total = max(sum(waits), named)  # rows that wait at the end are reduced after the last token
    return Latency(
        total=total, time_to_first_token=waits[0] if waits else None, inter_token_mean=summary.mean(waits[1:]),
        by_operation={
            "prompt": trace.prompt_seconds, "forward": forward, "capture": capture,
            "drawing and the rest": total - named,
        },
    )  # fmt: skip
