"""What the dashboard draws of a report, as rows: plain functions of reports, without a browser."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from atlas_lm.inspection.schema import Column, LayerColumns, Report, Table

Row = dict[str, Any]

STRONG = 12.0  # bits: a token of probability 1 in 4,096 has the full colour
AROUND = 5  # tokens on each side of the one that a flag points to
PER_STEP = {  # figures of a layer at a step → what they are called
    "entropy_mean": "attention entropy, mean over heads (bits)",
    "entropy_min": "attention entropy, smallest head (bits)",
    "entropy_max": "attention entropy, largest head (bits)",
    "concentration_mean": "largest attention weight, mean over heads",
    "concentration_max": "largest attention weight of any head",
    "collapsed": "collapsed heads",
    "focused": "focused heads",
    "norm": "norm of the hidden state",
    "nonfinite": "NaN and infinity",
}
PER_HEAD = {"head_entropy": "attention entropy (bits)", "head_concentration": "largest attention weight"}
OF_PROMPT = {"seen_keys": "keys with a weight above 0.01", "basin": "middle mass relative to the causal null"}
OF_MEMORY = {
    "weight_norm": "norm of W − W_init",
    "relative_change": "change of W per token, relative",
    "write_strength": "write strength",
    "half_life": "half-life (tokens)",
    "saturated_gates": "saturated gates (share)",
    "output_ratio": "memory's output ÷ attention's",
    "radius_share": "share of the bound on W",
    "effective_rank": "effective rank of W − W_init",
}


def listed(report: Report) -> Row:
    """A report in the list of all."""
    return {
        "model": report.model.name,
        "created": report.created[:19].replace("T", " "),
        "tokens": len(report.steps.token_ids),
        "flags": ", ".join(report.fired),
        "perplexity": report.baselines.perplexity,
        "seconds": report.latency.total,
        "id": report.id,
    }


def settings(report: Report) -> list[Row]:
    """What was inspected, and how."""
    model, how = report.model, report.settings
    found = {
        "model": f"{model.name} ({model.kind}, {model.parameters:,} parameters)",
        "size": f"{model.layers} layers, {model.heads} heads, {model.vocabulary:,} tokens in the vocabulary",
        "memories": ", ".join(model.memories) or "none",
        "capture": f"{how.capture}, every {how.every} steps, layers {', '.join(map(str, how.layers)) or 'none'}",
        "sampling": f"temperature {how.temperature:g}, top-k {how.top_k}, top-p {how.top_p:g}, seed {how.seed}",
        "id": report.id,
    }
    return [{"setting": name, "value": value} for name, value in found.items()]


def visible(token: str) -> str:
    """A token on one line, with what cannot be seen written out."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


def pointed_at(report: Report) -> dict[int, list[str]]:
    """Step → the flags that fired and point to it."""
    found: dict[int, list[str]] = {}
    for flag in report.flags:
        for step in flag.steps if flag.fired else []:
            found.setdefault(step, []).append(flag.name)
    return found


def step_rows(report: Report) -> list[Row]:
    """A row for each generated token."""
    steps, flags = report.steps, pointed_at(report)
    names = ("entropy_bits", "surprisal_bits", "perplexity", "margin", "top_k_mass", "repetition_period")
    return [
        {
            "step": i,
            "token": visible(token),
            **{name: _at(getattr(steps, name), i) for name in names},
            "most likely": ", ".join(map(visible, _at(steps.top_tokens, i) or [])),
            "flags": ", ".join(flags.get(i, [])),
        }
        for i, token in enumerate(steps.tokens)
    ]


def colour(bits: float | None) -> str:
    """CSS colour of a surprisal: white at 0 bits, orange at STRONG, grey where there is none."""
    if bits is None:
        return "#d9d9d9"
    share = min(1.0, max(0.0, bits / STRONG))
    red, green, blue = (round(255 + share * (end - 255)) for end in (240, 110, 40))
    return f"#{red:02x}{green:02x}{blue:02x}"


def coloured(tokens: list[str], surprisal: Column, flags: dict[int, list[str]], first: int = 0) -> str:
    """Tokens as HTML on a background of their surprisal; those that a flag points to are underlined.

    `surprisal` belongs to the tokens from `first` on: the first token of a prompt has none.
    """
    parts = []
    for i, token in enumerate(tokens):
        bits = _at(surprisal, i - first) if i >= first else None
        about = f"step {i}: " + ("no surprisal" if bits is None else f"{bits:.2f} bits")
        marks = flags.get(i, [])
        style = f"background:{colour(bits)};color:#111;border-radius:2px;white-space:pre-wrap;overflow-wrap:anywhere;"
        style += "border-bottom:3px solid #b00020;" if marks else ""
        about += f" · {', '.join(marks)}" if marks else ""
        text = html.escape(token.replace("\n", "↵\n")) or "∅"
        parts.append(f'<span title="{html.escape(about, quote=True)}" style="{style}">{text}</span>')
    style = "background:#fff;padding:10px;line-height:1.9;font-family:monospace;max-height:420px;overflow:auto;"
    return f'<div class="tokens" style="{style}">{"".join(parts)}</div>'


def generated(report: Report) -> str:
    """The generated tokens as HTML."""
    return coloured(report.steps.tokens, report.steps.surprisal_bits, pointed_at(report))


def prompt(report: Report) -> str:
    """The prompt's tokens as HTML."""
    return coloured(report.prompt.tokens, report.prompt.surprisal_bits, {}, first=1)


def layer_rows(report: Report, columns: LayerColumns, figure: str) -> list[Row]:
    """Step × layer of one of PER_STEP."""
    rows: Table = getattr(columns, figure)
    layers = report.settings.layers
    return [
        {"step": step, "layer": _at(layers, i) if i < len(layers) else i, "value": value}
        for step, row in zip(columns.steps, rows, strict=False)
        for i, value in enumerate(row)
    ]


def head_rows(report: Report, rows: Table) -> list[Row]:
    """Layer × head of one of PER_HEAD or OF_PROMPT."""
    layers = report.settings.layers
    return [
        {"layer": _at(layers, i) if i < len(layers) else i, "head": head, "value": value}
        for i, row in enumerate(rows)
        for head, value in enumerate(row)
    ]


def memory_rows(report: Report, figure: str) -> list[Row]:
    """One of OF_MEMORY over steps."""
    columns = report.memory
    return [
        {"step": step, "memory": label, "value": value}
        for step, row in zip(columns.steps, getattr(columns, figure), strict=False)
        for label, value in zip(columns.labels, row, strict=False)
    ]


def residual_rows(report: Report) -> list[Row]:
    """Error of retrieving what was written so many tokens ago, over steps."""
    columns = report.memory
    return [
        {"step": step, "memory": label, "lag": lag, "series": f"{label}, {lag} tokens ago", "value": value}
        for step, table in zip(columns.steps, columns.residual, strict=False)
        for label, row in zip(columns.labels, table, strict=False)
        for lag, value in zip(columns.lags, row, strict=False)
    ]


def prompt_layer_rows(report: Report) -> list[Row]:
    """Figures of each captured layer while it read the prompt. Transformation is that to the next one."""
    of, layers = report.prompt, report.settings.layers
    names = ("entropy_mean", "concentration_mean", "norm", "transformation", "nonfinite")
    return [
        {"layer": layer, **{name: _at(getattr(of, name), i) for name in names}}
        for i, layer in enumerate(layers)
        if any(_at(getattr(of, name), i) is not None for name in names)
    ]


def flag_rows(report: Report) -> list[Row]:
    """Those that fired first."""
    return [
        {
            "flag": flag.name,
            "fired": flag.fired,
            "value": flag.value,
            "threshold": flag.threshold,
            "steps": _ranges(flag.steps),
            "what": flag.message,
        }
        for flag in sorted(report.flags, key=lambda flag: not flag.fired)
    ]


def around(report: Report, step: int) -> str:
    """The tokens about a step as HTML, the step's own among them."""
    start = max(0, step - AROUND)
    tokens = report.steps.tokens[start : step + AROUND + 1]
    surprisal = report.steps.surprisal_bits[start : step + AROUND + 1]
    return coloured(tokens, surprisal, {step - start: [f"step {step}"]})


def _ranges(steps: list[int]) -> str:
    """As "3–7, 12"."""
    spans: list[list[int]] = []
    for step in sorted(steps):
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def latency_rows(report: Report) -> list[Row]:
    """Seconds of each step, whole and by part."""
    parts = {"whole step": "latency_seconds", "forward": "forward_seconds", "capture": "capture_seconds"}
    return [
        {"step": i, "part": part, "seconds": value}
        for part, name in parts.items()
        for i, value in enumerate(getattr(report.steps, name))
    ]


def operation_rows(report: Report) -> list[Row]:
    """Seconds of the generation by operation."""
    return [{"operation": name, "seconds": seconds} for name, seconds in report.latency.by_operation.items()]


def comparison(a: Report, b: Report) -> list[Row]:
    """Every figure of two reports side by side; the difference where both have it."""
    left, right = dict(_figures(a)), dict(_figures(b))
    rows = []
    for name in {**left, **right}:
        x, y = left.get(name), right.get(name)
        rows.append({"figure": name, "A": x, "B": y, "B − A": None if x is None or y is None else y - x})
    return rows


def flag_comparison(a: Report, b: Report) -> list[Row]:
    """Flags of two reports; those in which they differ first."""
    states = [{flag.name: "fired" if flag.fired else "quiet" for flag in report.flags} for report in (a, b)]
    names = {**states[0], **states[1]}
    rows = [{"flag": name, "A": states[0].get(name, "–"), "B": states[1].get(name, "–")} for name in names]
    return sorted(rows, key=lambda row: row["A"] == row["B"])


def _figures(report: Report) -> Iterator[tuple[str, float | None]]:
    yield "tokens", float(len(report.steps.token_ids))
    yield from report.baselines.model_dump().items()
    yield from ((name, value) for name, value in report.summary.items())
    yield "seconds", report.latency.total
    yield "seconds to the first token", report.latency.time_to_first_token
    yield "seconds between tokens", report.latency.inter_token_mean


def _at(column: list[Any], i: int) -> Any:
    """None beyond the end: a column that was not captured is empty."""
    return column[i] if 0 <= i < len(column) else None
