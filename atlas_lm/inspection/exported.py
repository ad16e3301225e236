"""What sinks get of a generation: live figures and reports as named numbers.

Names follow vLLM's where it has the figure (time_to_first_token_seconds, inter_token_latency_seconds,
e2e_request_latency_seconds, prompt_tokens_total, generation_tokens_total), and for OpenTelemetry the conventions for
generative AI (gen_ai.*). Labels are few: the model, and within it flags, layers, memories and operations. Text,
prompts and ids never leave as a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atlas_lm.inspection.schema import Report
from atlas_lm.loggers.senders.metric import Labels, Metric, labelled

# Upper ends of the buckets, seconds and bits. Those of vLLM, and smaller ones for models that run on a CPU's core.
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
REQUEST_SECONDS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
BITS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16)
# Those that the conventions for generative AI advise.
GEN_AI_TOKENS = tuple(float(4**i) for i in range(14))
GEN_AI_SECONDS = tuple(0.01 * 2**i for i in range(14))
GEN_AI_FIRST_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
)  # fmt: skip
GEN_AI_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)

MEMORY = {  # columns of a report's memory → unit, help
    "weight_norm": ("1", "norm of W - W_init of a memory"),
    "relative_change": ("1", "norm of the change of W over the norm of W, per token"),
    "write_strength": ("1", "mean write strength of a memory"),
    "half_life": ("{token}", "tokens after which a memory keeps half"),
    "saturated_gates": ("1", "share of fusion gates that are within 0.02 of 0 or 1"),
    "output_ratio": ("1", "norm of the memory's output over that of attention's"),
    "radius_share": ("1", "largest root mean square of W - W_init over the bound on it"),
    "effective_rank": ("1", "effective rank of W - W_init"),
    "residual": ("1", "relative error of retrieving the token written last"),
}

Numbers = Sequence[float | None]


class Live(NamedTuple):
    """What a generation has to say while it runs, since it said so the last time."""

    tokens: int
    """Written since."""
    entropy_bits: Numbers = ()
    """Of those steps; None where it was not measured."""
    surprisal_bits: Numbers = ()
    inter_token_latency_seconds: Numbers = ()
    """Of those steps but the first token's, which waits for the prompt."""
    memory: Mapping[str, Mapping[str, float | None]] = {}
    """Label of a memory, as in `ModelInfo.memories` → names of MEMORY → their newest value."""


@dataclass
class Sent:
    """What live figures have already counted of a generation, so that its report does not count it again.

    Values are counted without None, as callers may leave those out.
    """

    tokens: int = 0
    entropy_bits: int = 0
    surprisal_bits: int = 0
    inter_token_latency_seconds: int = 0

    def add(self, live: Live) -> None:
        self.tokens += live.tokens
        for name in ("entropy_bits", "surprisal_bits", "inter_token_latency_seconds"):
            setattr(self, name, getattr(self, name) + len(_known(getattr(live, name))))


def live_metrics(model_name: str, live: Live) -> list[Metric]:
    """Of one call."""
    model = labelled(model_name=model_name)
    return [
        *_tokens(model, "generation", live.tokens),
        *_histogram("token_entropy_bits", live.entropy_bits, model, "bit", BITS),
        *_histogram("token_surprisal_bits", live.surprisal_bits, model, "bit", BITS),
        *_histogram("inter_token_latency_seconds", live.inter_token_latency_seconds, model, "s", TOKEN_SECONDS),
        *(metric for label, found in live.memory.items() for metric in _memory(model, label, found)),
    ]


def report_metrics(report: Report, sent: Sent) -> list[Metric]:
    """Of a finished generation, without what was `sent` while it ran."""
    model = labelled(model_name=report.model.name)
    steps, latency = report.steps, report.latency
    waits = _known(steps.latency_seconds[1:])[sent.inter_token_latency_seconds :]
    found = [
        Metric("reports_total", "counter", (1.0,), model, "{report}", "generations that were reported"),
        *_tokens(model, "prompt", len(report.prompt.tokens)),
        *_tokens(model, "generation", max(0, len(steps.token_ids) - sent.tokens)),
        *_histogram("token_entropy_bits", _known(steps.entropy_bits)[sent.entropy_bits :], model, "bit", BITS),
        *_histogram("token_surprisal_bits", _known(steps.surprisal_bits)[sent.surprisal_bits :], model, "bit", BITS),
        *_histogram("inter_token_latency_seconds", waits, model, "s", TOKEN_SECONDS),
        *_histogram("time_to_first_token_seconds", [latency.time_to_first_token], model, "s", FIRST_TOKEN_SECONDS),
        *_histogram("e2e_request_latency_seconds", [latency.total], model, "s", REQUEST_SECONDS),
    ]  # fmt: skip
    found += [
        Metric("health_flags_total", "counter", (float(flag.fired),), (*model, ("flag", flag.name)), "{report}",
               "reports in which a flag fired")
        for flag in report.flags
    ] + [
        Metric("operation_seconds_total", "counter", (seconds,), (*model, ("operation", name)), "s",
               "seconds by operation")
        for name, seconds in latency.by_operation.items()
        if seconds is not None
    ]  # fmt: skip
    return found + _last_layers(model, report) + _last_memories(model, report)


def gen_ai_metrics(report: Report) -> list[Metric]:
    """What OpenTelemetry has a name for. One observation for a generation each, as the conventions want it."""
    common = (
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.provider.name", "atlas_lm"),
        ("gen_ai.request.model", report.model.name),
    )
    latency, written = report.latency, len(report.steps.token_ids)
    found: list[Metric] = []
    for kind, count in (("input", len(report.prompt.tokens)), ("output", written)):
        labels = (*common, ("gen_ai.token.type", kind))
        found += _histogram("gen_ai.client.token.usage", [float(count)], labels, "{token}", GEN_AI_TOKENS)
    found += _histogram("gen_ai.client.operation.duration", [latency.total], common, "s", GEN_AI_SECONDS)
    first, later = latency.time_to_first_token, latency.inter_token_mean
    found += _histogram("gen_ai.server.time_to_first_token", [first], common, "s", GEN_AI_FIRST_SECONDS)
    return found + _histogram("gen_ai.server.time_per_output_token", [later], common, "s", GEN_AI_TOKEN_SECONDS)


IN_GEN_AI = {  # that the conventions name otherwise: each figure goes to OpenTelemetry once
    "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds", "e2e_request_latency_seconds",
}  # fmt: skip


def without_gen_ai(metrics: Sequence[Metric]) -> list[Metric]:
    """Those that go under our own namespace."""
    return [metric for metric in metrics if metric.name not in IN_GEN_AI]


def _known(values: Numbers) -> list[float]:
    return [float(value) for value in values if value is not None]


def _tokens(model: Labels, what: str, count: int) -> list[Metric]:
    return [Metric(f"{what}_tokens_total", "counter", (float(count),), model, "{token}", f"tokens of the {what}")]


def _histogram(name: str, values: Numbers, labels: Labels, unit: str, buckets: tuple[float, ...]) -> list[Metric]:
    known = _known(values)
    return [Metric(name, "histogram", tuple(known), labels, unit, name.replace("_", " "), buckets)] if known else []


def _gauge(name: str, value: float | None, labels: Labels, unit: str, about: str) -> list[Metric]:
    return [] if value is None else [Metric(name, "gauge", (float(value),), labels, unit, about)]


def _memory(model: Labels, label: str, found: Mapping[str, float | None]) -> list[Metric]:
    labels = (*model, ("memory", label))
    return [
        metric
        for name, (unit, about) in MEMORY.items()
        for metric in _gauge(f"memory.{name}", found.get(name), labels, unit, about)
    ]


def _last_memories(model: Labels, report: Report) -> list[Metric]:
    columns = report.memory
    metrics: list[Metric] = []
    for i, label in enumerate(columns.labels):
        found = {name: rows[-1][i] for name in MEMORY if name != "residual" and (rows := getattr(columns, name))}
        if columns.residual and 0 in columns.lags:
            found["residual"] = columns.residual[-1][i][columns.lags.index(0)]
        metrics += _memory(model, label, found)
    return metrics


def _last_layers(model: Labels, report: Report) -> list[Metric]:
    metrics: list[Metric] = []
    for i, layer in enumerate(report.settings.layers):
        labels = (*model, ("layer", str(layer)))
        for name, rows, unit, about in (
            ("layer.attention_entropy_bits", report.layers.entropy_mean, "bit", "attention's entropy, mean over heads"),
            ("layer.norm", report.layers.norm, "1", "L2 norm of the hidden state"),
        ):
            metrics += _gauge(name, rows[-1][i] if rows else None, labels, unit, about)
    return metrics
