"""The spike threshold that fits a run (C3): python -m atlas_lm calibrate run=stage1

Reads how far the held-out perplexity rose above its moving average in an observed run (`spike_rollback/ppl_delta`) and
sets the threshold above what is usual there: the 99th percentile plus one standard deviation, and never below 5 %.
Writes calibration.json and calibration.png to the run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from atlas_lm.cli.arguments import parse
from atlas_lm.cli.figures import new_figure, save
from atlas_lm.files import write_atomically
from atlas_lm.loggers.jsonl import FIELDS, read_rows
from atlas_lm.runs.resolve import resolve_run

LEAST_DELTAS = 20  # below, a 99th percentile says no more than the largest value
LEAST_THRESHOLD = 0.05  # taken where even the 99th percentile is lower
UNSTABLE = 0.10  # 99th percentile above which training itself is at fault
SETTING = "callbacks.spike_rollback"
BINS, BAR = 16, 40  # of the histogram on the terminal: lines, characters


@dataclass
class Options:
    """Derive the threshold of callbacks.spike_rollback from a run that was observed."""

    run: str
    """Run folder or experiment, for example run=stage1."""
    outputs: str = "outputs"
    """Folder of all runs."""


@dataclass(frozen=True)
class Calibration:
    """The threshold and what it stands on; all but the counts and verdicts are relative rises, 0.05 is 5 %."""

    threshold: float
    count: int
    """Finite deltas."""
    nonfinite: int
    """Deltas that were NaN or infinite; in no other value."""
    p50: float
    p99: float
    largest: float
    sigma: float
    """Standard deviation."""
    unstable: bool
    """p99 above 10 %."""
    rising: bool
    """The perplexity was rising at the end: the mean of the last quarter of the deltas is clearly above 0."""


def calibrated_threshold(deltas: Sequence[float]) -> Calibration:
    """p99 + 1 σ of the deltas in the order in which they were logged; 5 % where p99 is lower than that.

    ValueError: fewer than 20 finite deltas.
    """
    values = np.array([delta for delta in deltas if math.isfinite(delta)], dtype=np.float64)
    nonfinite = len(deltas) - len(values)
    if len(values) < LEAST_DELTAS:
        bad = f" ({nonfinite} more are not finite)" if nonfinite else ""
        raise ValueError(
            f"{len(values)} deltas of the perplexity{bad}, at least {LEAST_DELTAS} are needed: run longer, with "
            f"{SETTING} and a smaller {SETTING}.every_n_steps"
        )
    p50, p99 = (float(p) for p in np.percentile(values, (50, 99)))
    sigma = float(values.std())
    last = values[-(len(values) // 4) :]
    return Calibration(
        threshold=p99 + sigma if p99 >= LEAST_THRESHOLD else LEAST_THRESHOLD,
        count=len(values),
        nonfinite=nonfinite,
        p50=p50,
        p99=p99,
        largest=float(values.max()),
        sigma=sigma,
        unstable=p99 > UNSTABLE,
        rising=bool(last.mean() > max(3 * last.std(ddof=1) / math.sqrt(len(last)), 1e-6)),
    )


def read_deltas(path: Path) -> list[float]:
    """The deltas of a metrics.jsonl in order; NaN where one was logged that is not finite.

    ValueError: a broken line. OSError: no file.
    """
    rows = read_rows(path)
    name = FIELDS["ppl_delta"]
    found = [math.nan if name in row.get("nonfinite", ()) else row.get("ppl_delta") for row in rows]
    return [float(delta) for delta in found if delta is not None]


def verdict(found: Calibration) -> list[str]:
    """What to think of it; the first line is the verdict."""
    if found.unstable:
        lines = [
            f"TRAINING IS UNSTABLE: p99 is {found.p99:.1%}, above {UNSTABLE:.0%}. No threshold mends that: "
            "lower optim.lr or model.eta_max, or lengthen optim.warmup_steps, and calibrate again"
        ]
    elif found.threshold == LEAST_THRESHOLD:
        lines = [f"stable: p99 is {found.p99:.1%}, below {LEAST_THRESHOLD:.0%}, which is the least threshold"]
    else:
        lines = [f"p99 is {found.p99:.1%}, between {LEAST_THRESHOLD:.0%} and {UNSTABLE:.0%}: threshold = p99 + 1 sigma"]
    if found.nonfinite:
        lines.append(f"WARNING: {found.nonfinite} more deltas were NaN or infinite; they are left out of all values")
    if found.rising:
        lines.append("WARNING: the perplexity was rising at the end of the run: calibrate on a healthy run")
    return lines


def histogram(deltas: Sequence[float], threshold: float) -> str:
    """The finite deltas as lines of text, the smallest first; the line with the threshold is marked."""
    values = [delta for delta in deltas if math.isfinite(delta)]
    counts, edges = np.histogram(values, BINS, (min(*values, threshold), max(*values, threshold)))
    marked = min(int(np.searchsorted(edges, threshold, side="right")) - 1, BINS - 1)
    lines = []
    for i, count in enumerate(counts):
        bar = "█" * math.ceil(BAR * count / counts.max())
        line = f"{edges[i]:+8.1%} to {edges[i + 1]:+8.1%} {count:6d} {bar}"
        lines.append(line + (" ← threshold" if i == marked else ""))
    return "\n".join(lines)


def draw(deltas: Sequence[float], found: Calibration, path: Path) -> None:
    """calibration.png: the histogram of the deltas, in percent, with p99 and the threshold."""
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    axes.hist([100 * delta for delta in deltas if math.isfinite(delta)], bins=40)
    axes.axvline(100 * found.p99, color="grey", linestyle=":", label=f"p99 {found.p99:.2%}")
    axes.axvline(100 * found.threshold, color="red", label=f"threshold {found.threshold:.2%}")
    axes.set(xlabel="rise of the held-out perplexity above its average, %", ylabel="measurements")
    axes.set_title(
        f"TRAINING IS UNSTABLE: p99 above {UNSTABLE:.0%}" if found.unstable else f"{found.count} measurements"
    )
    axes.legend(fontsize=8)
    save(figure, path)


def calibrate(run: Path, console: Console | None = None) -> Calibration:
    """Print, write and draw the calibration of a run folder.

    ValueError: too few deltas, or a broken metrics.jsonl. OSError: none, or a folder that cannot be written to.
    """
    deltas = read_deltas(run / "metrics.jsonl")
    try:
        found = calibrated_threshold(deltas)
    except ValueError as error:
        raise ValueError(f"{run} has {error}") from None
    override = f"{SETTING}.threshold={found.threshold:.4f}"
    content = {**asdict(found), "override": override, "verdict": verdict(found), "run": str(run)}
    write_atomically(run / "calibration.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    draw(deltas, found, run / "calibration.png")
    summary = (
        f"{found.count} deltas, {found.nonfinite} not finite: p50 {found.p50:.2%}, p99 {found.p99:.2%}, "
        f"max {found.largest:.2%}, sigma {found.sigma:.2%}"
    )
    written = f"wrote {run / 'calibration.json'} and {run / 'calibration.png'}"
    console = console or Console()
    for line in (
        histogram(deltas, found.threshold),
        summary,
        f"threshold: {found.threshold:.4f} ({found.threshold:.2%})",
        f"verdict: {verdict(found)[0]}",
        *verdict(found)[1:],
        f"use it with: {override}",
        written,
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return found


def main(arguments: list[str]) -> None:
    """See the module. ValueError: bad arguments, no such run, or too few deltas in it."""
    options = parse(Options, arguments, "python -m atlas_lm calibrate")
    calibrate(resolve_run(options.run, options.outputs))
