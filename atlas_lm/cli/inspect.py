"""What a model does while it generates: python -m atlas_lm inspect run=stage1 prompt="def "

python -m atlas_lm inspect model=<folder> prompt="…"       # any causal or seq2seq model of transformers
python -m atlas_lm inspect calibrate run=stage1            # thresholds of its flags, from clean text
python -m atlas_lm inspect compare A B                     # two reports side by side
python -m atlas_lm inspect dashboard                       # all reports and training runs in a browser
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atlas_lm import __version__
from atlas_lm.cli import inspect_calibrate
from atlas_lm.cli.arguments import parse
from atlas_lm.cli.inspect_subject import COMMAND, THRESHOLDS, bar, check_subject, layers_of, open_subject
from atlas_lm.config.names import nearest
from atlas_lm.files import write_atomically
from atlas_lm.inspection import page, schema, sinks
from atlas_lm.inspection.capture import Plan, Trace
from atlas_lm.inspection.exported import MEMORY
from atlas_lm.inspection.health import Thresholds, read_thresholds
from atlas_lm.inspection.memory import DEEP_EVERY
from atlas_lm.inspection.schema import Report
from atlas_lm.inspection.subject import inspect_text


@dataclass
class Options:
    """Generate from a prompt and report what the model did: entropy, attention, memory health, flags."""

    run: str = ""
    """Run folder, experiment or checkpoint of ours; or give model=."""
    model: str = ""
    """Folder of a model of transformers."""
    gguf: str = ""
    """File of quantised weights in that folder."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 64
    """Tokens to write."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 50
    """Tokens to draw from."""
    top_p: float = 1.0
    """Probability of the tokens to draw from; below 1 for models of transformers alone."""
    seed: int = 0
    """Of the draws."""
    capture: str = "full"
    """full: every step; sampled: every 64th, and loops of all; off: logits alone."""
    layers: str = "all"
    """Layers to capture, counted from 0, with commas between them."""
    thresholds: str = ""
    """File that `inspect calibrate` wrote; that of the run if none is given."""
    sink: str = "local"
    """local, prometheus, datadog, otlp, with commas between them."""
    port: int = sinks.PORT
    """Of the page for Prometheus; 0: a free one."""
    host: str = "127.0.0.1"
    """On which that page is served; 0.0.0.0 lets other machines scrape it."""
    linger: float = 0.0
    """Seconds to wait at the end until that page has been scraped."""
    datadog: str = ""
    """http(s)://… of another server than Datadog's."""
    otlp: str = ""
    """http(s)://<collector>:4318; OTEL_EXPORTER_OTLP_ENDPOINT or this machine if none is given."""
    out: str = ""
    """Folder for what is written; inspection/<time> in the run folder, or here, if none is given."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        check_subject(self.run, self.model, self.gguf)
        if self.run and self.top_p < 1:
            raise ValueError(f"top_p={self.top_p} is for model=: our own generation draws from the top_k likeliest")


@dataclass
class Comparison:
    """Two reports side by side."""

    reports: list[str] = field(default_factory=list)
    """Two files report.json, or folders with one."""


@dataclass
class Dashboard:
    """All reports and training runs in a browser."""

    folder: str = "."
    """Where to search for reports."""
    port: int = 8501
    """To serve on."""
    outputs: str = "outputs"
    """Folder of all runs."""


def main(arguments: list[str]) -> None:
    """See the module. ValueError: bad arguments, or what they name is not there."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "calibrate": inspect_calibrate.main, "compare": compare_main, "dashboard": dashboard_main,
    }  # fmt: skip
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        name = arguments[0]
        if name not in commands:
            raise ValueError(
                f"inspect {name} is unknown{nearest(name, commands)}: there are {', '.join(commands)}, and "
                "run=… prompt=… alone"
            )
        commands[name](arguments[1:])
        return
    inspect_main(arguments)


def inspect_main(arguments: list[str]) -> None:
    o = parse(Options, arguments, COMMAND)
    sinks.check_sinks(o.sink)
    interrupt = Interrupt()
    plan = Plan(o.tokens, o.temperature, o.top_k, o.top_p, o.seed, o.capture, layers_of(o.layers), stops=interrupt.came)
    if not o.prompt:
        raise ValueError("prompt= is missing: text for the model to continue")
    subject, home = open_subject(o)
    if o.thresholds:
        thresholds = read_thresholds(Path(o.thresholds))
    elif (home / THRESHOLDS).is_file():
        thresholds = read_thresholds(home / THRESHOLDS)
    else:
        thresholds = Thresholds()
    out = Path(o.out) if o.out else home / time.strftime("%Y-%m-%d_%H-%M-%S")
    opened = sinks.open_sinks(
        o.sink, out, write_page, port=o.port, host=o.host, linger=o.linger, datadog=o.datadog, otlp=o.otlp
    )
    try:
        with interrupt, bar() as progress:
            task = progress.add_task("tokens", total=plan.tokens)
            live = Streaming(opened, subject.info.name)

            def on_flush(trace: Trace) -> None:
                progress.update(task, completed=len(trace.steps.token_ids))
                live.flush(trace)

            report = inspect_text(subject, o.prompt, plan, thresholds, __version__, on_flush)
        print(o.prompt + report.text)
        print()
        print(summary(report))
        for line in opened.report(report):
            print(line)
    finally:
        opened.close()
    if interrupt.came():
        raise SystemExit(130)


class Interrupt:
    """The first Ctrl-C ends the generation, which is reported as far as it came; the second one ends the command."""

    def __init__(self) -> None:
        self._came = False

    def came(self) -> bool:
        return self._came

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # nobody else may set a handler
            self._before = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self._came = True
        signal.signal(signal.SIGINT, self._before)


class Streaming:
    """What was written since the last flush goes to the sinks that are live."""

    def __init__(self, opened: sinks.Sinks, name: str) -> None:
        self.opened, self.name, self.sent = opened, name, 0

    def flush(self, trace: Trace) -> None:
        if not self.opened.is_live:
            return
        steps, memory = trace.steps, trace.memory
        some = slice(self.sent, len(steps.token_ids))
        self.opened.step(
            self.name,
            sinks.Live(
                tokens=some.stop - some.start,
                entropy_bits=[x for x in steps.entropy_bits[some] if x is not None],
                surprisal_bits=[x for x in steps.surprisal_bits[some] if x is not None],
                inter_token_latency_seconds=[
                    x for i, x in enumerate(steps.latency_seconds[some], some.start) if x is not None and i
                ],
                memory=last_row(memory),
            ),
        )
        self.sent = some.stop


def last_row(memory: schema.MemoryColumns) -> dict[str, dict[str, float]]:
    """The newest figures of each memory by its label; ranks and residuals are not in every row."""
    found: dict[str, dict[str, float]] = {label: {} for label in memory.labels}
    residuals = [[of[0] for of in row] for row in memory.residual]  # lag 0: of the token written last
    for name in MEMORY:
        rows = residuals if name == "residual" else getattr(memory, name)
        for row in rows[-DEEP_EVERY:]:
            for label, value in zip(memory.labels, row, strict=True):
                if value is not None:
                    found[label][name] = value
    return found


def write_page(report: Report, path: Path) -> None:
    write_atomically(path, page.page(report))


def summary(report: Report) -> str:
    """A few lines: what was raised, and the cheap scores beside it."""
    lines = []
    for flag in report.flags:
        if flag.fired:
            steps = f" (steps {', '.join(map(str, flag.steps[:8]))}{' …' if len(flag.steps) > 8 else ''})"
            lines.append(f"raised: {flag.name}: {flag.message}{steps if flag.steps else ''}")
    quiet = [flag.name for flag in report.flags if not flag.fired]
    lines.append(f"not raised: {', '.join(quiet)}")
    if not report.thresholds.get("centre"):
        lines.append(f"thresholds are general ones: {COMMAND} calibrate fits them to this model")
    b = report.baselines
    lines.append(
        f"perplexity of the text {page.shown(b.perplexity)}, entropy {page.shown(b.mean_entropy_bits)} bits (at most "
        f"{page.shown(b.max_entropy_bits)}), {1 / (report.latency.inter_token_mean or 1):.0f} tokens/s"
    )
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report.warnings)])


def read_report(path: str) -> Report:
    """Of a file, or of a folder with one."""
    file = Path(path) / sinks.JSON if Path(path).is_dir() else Path(path)
    try:
        return schema.read(file)
    except FileNotFoundError:
        raise ValueError(f"no report {str(file)!r}: correct the path") from None


def compare_main(arguments: list[str]) -> None:
    o = parse(Comparison, arguments, f"{COMMAND} compare")
    if len(o.reports) != 2:
        raise ValueError(f"compare takes two reports, got {len(o.reports)}: {COMMAND} compare A B")
    print(compared(*(read_report(path) for path in o.reports)))


def compared(a: Report, b: Report) -> str:
    """A table: flags, baselines and every figure of the summary, with the difference."""
    rows: list[Sequence[str]] = [("", f"A: {a.model.name} {a.created}", f"B: {b.model.name} {b.created}", "B − A")]
    flags = {report.id: {flag.name: flag for flag in report.flags} for report in (a, b)}
    for name in dict.fromkeys([*flags[a.id], *flags[b.id]]):
        states = [("raised" if f.fired else "no") if (f := flags[r.id].get(name)) else "–" for r in (a, b)]
        rows.append((f"flag {name}", *states, "" if states[0] == states[1] else "differs"))
    of_a, of_b = ({**r.baselines.model_dump(), **r.summary} for r in (a, b))
    for name in dict.fromkeys([*of_a, *of_b]):
        x, y = of_a.get(name), of_b.get(name)
        rows.append((name, page.shown(x), page.shown(y), "–" if x is None or y is None else f"{y - x:+.4g}"))
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def dashboard_main(arguments: list[str]) -> None:
    o = parse(Dashboard, arguments, f"{COMMAND} dashboard")
    from atlas_lm.inspection.serve import serve

    if not Path(o.folder).is_dir():
        raise ValueError(f"folder={o.folder}: there is no such folder; correct the path")
    serve(Path(o.folder), Path(o.outputs), o.port)
