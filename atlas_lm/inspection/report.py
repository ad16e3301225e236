"""From a trace to a report: names, summary, baselines and flags."""

from __future__ import annotations

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
    report = Report(
        id=uuid.uuid4().hex, created=datetime.now(UTC).isoformat(timespec="seconds"), version=version, model=model,
        settings=Settings(
            capture=plan.capture, layers=plan.chosen(model.layers) if plan.every else [], every=plan.every,  # type: ignore[arg-type]
            tokens=plan.tokens, temperature=plan.temperature, top_k=plan.top_k, top_p=plan.top_p, seed=plan.seed,
        ),
        prompt=prompt, text=text, steps=steps, layers=trace.layers, cross=trace.cross, memory=trace.memory,
        latency=latency_of(trace), summary={}, baselines=baselines_of(trace), flags=[], warnings=trace.warnings,
    )  # fmt: skip
    report.summary = summary.summary_of(report)
    report.flags = health.flags_of(report, thresholds)
    report.thresholds = thresholds.model_dump(mode="json")
    # what is not finite is null
    return Report.model_validate(report.model_dump())


def baselines_of(trace: Trace) -> Baselines:
    """Scores that one pass gives for nothing (LM-Polygraph's): every other score has to beat them."""
    bits = summary.numbers(trace.steps.surprisal_bits)
    entropies = summary.numbers(trace.steps.entropy_bits)
    if not bits:
        return Baselines()
    return Baselines(
        sequence_log2_probability=-sum(bits), perplexity=2 ** statistics.fmean(bits),
        mean_entropy_bits=summary.mean(entropies), max_entropy_bits=summary.largest(entropies),
    )  # fmt: skip


def latency_of(trace: Trace) -> Latency:
    """Seconds, by what they were spent on: the steps overlap nothing, so the parts add up to the total."""
    steps = trace.steps
    waits = summary.numbers(steps.latency_seconds)
    forward, capture = sum(summary.numbers(steps.forward_seconds)), sum(summary.numbers(steps.capture_seconds))
    total = sum(waits)
    return Latency(
        total=total, time_to_first_token=waits[0] if waits else None, inter_token_mean=summary.mean(waits[1:]),
        by_operation={
            "forward": forward, "of it the prompt": trace.prompt_seconds, "capture": capture,
            "drawing and the rest": max(0.0, total - forward - capture),
        },
    )  # fmt: skip
