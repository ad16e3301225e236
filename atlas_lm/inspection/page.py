"""A report as one page of HTML that needs nothing else: flags first, the text coloured by surprise, then pictures."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable
from functools import partial

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from atlas_lm.inspection.schema import Column, Report, Table
from atlas_lm.inspection.summary import numbers

MOST_BITS = 12.0  # surprisal at which the colour is full
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
.fired { color: #b00020; font-weight: 600 } .quiet { color: #2e7d32 }
.text { white-space: pre-wrap; font: 14px/1.8 ui-monospace, monospace; background: #fafafa; padding: 1rem }
.text span { border-radius: 3px } .prompt { color: #777 } svg { max-width: 100%; height: auto }
"""


def page(report: Report) -> str:
    """The whole page."""
    title = html.escape(f"{report.model.name}: {len(report.steps.token_ids)} tokens, {report.created}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1>", _facts(report), "<h2>Health</h2>", _flags(report),
        "<h2>Text, coloured by surprise</h2>", _text(report),
    ]  # fmt: skip
    for heading, draw in _pictures(report):
        parts += [f"<h2>{heading}</h2>", svg(draw)]
    parts += ["<h2>Figures</h2>", _summary(report)]
    if report.warnings:
        parts += ["<h2>Warnings</h2>", "<ul>", *(f"<li>{html.escape(w)}" for w in report.warnings), "</ul>"]
    return "\n".join(parts) + "\n"


def _facts(report: Report) -> str:
    s, m = report.settings, report.model
    capture = f"{s.capture} capture" if s.capture != "off" else "logits alone"
    return (
        f"<p>{html.escape(m.name)} ({m.kind}): {m.parameters:,} parameters, {m.layers} layers, {m.heads} heads. "
        f"Temperature {s.temperature:g}, top-k {s.top_k}, top-p {s.top_p:g}, seed {s.seed}; {capture}. "
        f"atlas-lm {html.escape(report.version)}.</p>"
    )


def _flags(report: Report) -> str:
    rows = []
    for flag in report.flags:
        state = "<span class=fired>raised</span>" if flag.fired else "<span class=quiet>no</span>"
        steps = ", ".join(map(str, flag.steps[:8])) + (" …" if len(flag.steps) > 8 else "")
        where = f" (steps {steps})" if steps else ""
        rows.append(
            f"<tr><td>{flag.name}<td>{state}<td>{shown(flag.value)}<td>above {shown(flag.threshold)}"
            f"<td>{html.escape(flag.message)}{where}"
        )
    rows.append("<tr><th colspan=5>Cheap scores to compare with")
    rows += [f"<tr><td>{name}<td><td>{shown(value)}" for name, value in report.baselines.model_dump().items()]
    return "<table><tr><th>flag<th>state<th>value<th>threshold<th>where\n" + "\n".join(rows) + "</table>"


def _text(report: Report) -> str:
    spans = [f"<span class=prompt>{html.escape(''.join(report.prompt.tokens))}</span>"]
    columns = zip(report.steps.tokens, report.steps.surprisal_bits, report.steps.entropy_bits, strict=True)
    for i, (token, bits, entropy) in enumerate(columns):
        unknown = MOST_BITS if report.steps.has_logits(i) else 0.0
        share = min(1.0, (unknown if bits is None else bits) / MOST_BITS)
        note = f"step {i}: surprisal {shown(bits)}, entropy {shown(entropy)} bits"
        spans.append(f'<span title="{note}" style="background:rgba(230,60,30,{share:.2f})">{html.escape(token)}</span>')
    return f"<div class=text>{''.join(spans)}</div>"


def _summary(report: Report) -> str:
    rows = [f"<tr><td>{html.escape(name)}<td>{shown(value)}" for name, value in report.summary.items()]
    by = report.latency.by_operation
    rows += [f"<tr><td>seconds, {html.escape(name)}<td>{shown(value)}" for name, value in by.items()]
    return "<table>" + "\n".join(rows) + "</table>"


def shown(value: float | None) -> str:
    """Four digits; a dash for what is not there."""
    return "–" if value is None else f"{value:.4g}"


def svg(draw: Callable[[Axes], None]) -> str:
    """A picture inside a page."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    draw(figure.subplots())
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _pictures(report: Report) -> list[tuple[str, Callable[[Axes], None]]]:
    found: list[tuple[str, Callable[[Axes], None]]] = [("Entropy and surprisal by step", lambda ax: _lines(ax, report))]
    layers = report.layers
    if layers.entropy_mean:
        found.append(
            ("Attention: entropy of heads by layer, bits", lambda ax: heat(ax, layers.steps, layers.entropy_mean))
        )
    if layers.norm:
        logs: Table = [[None if not x or not math.isfinite(x) else math.log2(x) for x in row] for row in layers.norm]
        found.append(("Hidden states: log₂ of the norm by layer", lambda ax: heat(ax, layers.steps, logs)))
    memory = report.memory
    for name, heading in (
        ("weight_norm", "Memory: ‖W − W_init‖"), ("relative_change", "Memory: ‖ΔW‖ ÷ ‖W‖ a token"),
        ("output_ratio", "Memory's output ÷ attention's"), ("write_strength", "Memory: write strength"),
    ):  # fmt: skip
        if memory.labels and getattr(memory, name):
            found.append((heading, partial(by_memory, report=report, name=name)))
    return found


def _lines(ax: Axes, report: Report) -> None:
    steps = report.steps
    captured = [i for i in range(len(steps.entropy_bits)) if steps.has_logits(i)]
    marker = "." if len(captured) < len(steps.entropy_bits) else ""
    for values, label, alpha in ((steps.entropy_bits, "entropy", 1.0), (steps.surprisal_bits, "surprisal", 0.6)):
        ax.plot(captured, _plain([values[i] for i in captured]), marker=marker, label=label, alpha=alpha)
    ax.set(xlabel="step", ylabel="bits")
    ax.legend()


def heat(ax: Axes, steps: list[int], table: Table) -> None:
    """Steps from left to right, layers from below."""
    rows = [_plain(row) for row in table]
    columns = list(map(list, zip(*rows, strict=True)))
    extent = (steps[0], steps[-1] + 1, -0.5, len(columns) - 0.5)
    image = ax.imshow(columns, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    ax.set(xlabel="step", ylabel="layer")
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax)


def by_memory(ax: Axes, report: Report, name: str) -> None:
    """One line a memory."""
    for n, label in enumerate(report.memory.labels):
        ax.plot(report.memory.steps, _plain([row[n] for row in getattr(report.memory, name)]), ".-", label=label)
    ax.set(xlabel="step")
    if numbers(x for row in getattr(report.memory, name) for x in row):
        ax.legend()


def _plain(values: Column) -> list[float]:
    return [math.nan if x is None else x for x in values]
