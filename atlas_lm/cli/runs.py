"""Every run there is: what became of it, how far it came, and how good it is.

python -m atlas_lm runs                 # all below outputs/
python -m atlas_lm runs stage1 sweep/*  # of these experiments, or these folders
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atlas_lm.cli.arguments import parse
from atlas_lm.cli.compare import find_runs
from atlas_lm.config.parsing import CONFIG
from atlas_lm.runs.listing import KILLED, QUEUED, RUNNING, Entry, examine, with_queue

COLOURS = {
    "finished": "green",
    RUNNING: "cyan",
    QUEUED: "cyan",
    "failed": "red",
    KILLED: "red",
    "interrupted": "yellow",
}


@dataclass
class Options:
    """List runs, the one with the newest record first."""

    runs: list[str] = field(default_factory=list)
    """Run folders, folders of runs, experiments, or patterns of them; none: all below `outputs`."""
    outputs: str = "outputs"
    """Folder of all runs."""
    state: str = ""
    """Only runs in this state: running, queued, finished, stopped early, interrupted, failed, killed or not begun."""


def duration(seconds: float | None) -> str:
    """In the largest unit that says something."""
    if seconds is None:
        return "–"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def row(entry: Entry, base: Path) -> list[str]:
    """The cells of a run."""
    steps = "?" if entry.steps is None else f"{entry.steps:,}"
    loss = "–" if entry.loss is None else f"{entry.loss:.3f}" + ("" if entry.is_validation else " (train)")
    return [
        os.path.relpath(entry.folder, base),
        entry.state,
        "–" if entry.step is None else f"{entry.step:,} of {steps}",
        loss,
        "–" if entry.tokens_per_second is None else f"{entry.tokens_per_second:,.0f}",
        duration(entry.age),
    ]


def table(entries: Sequence[Entry], base: Path) -> Table:
    """All of them."""
    shown = Table("run", "state", "step", "loss", "tokens/s", "last record", box=None, pad_edge=False)
    shown.columns[0].overflow = "fold"  # a name that is cut cannot be given to another command
    for column in shown.columns[2:]:
        column.justify = "right"
    for entry in entries:
        cells = row(entry, base)
        colour = COLOURS.get(entry.state)
        cells[1] = f"[{colour}]{cells[1]}[/]" if colour else cells[1]
        shown.add_row(*cells)
    return shown


def main(arguments: list[str]) -> None:
    """Print the table. ValueError: a name without a run, or a state in which none is."""
    options = parse(Options, arguments, "python -m atlas_lm runs")
    outputs = Path(options.outputs)
    if not options.runs and not any(outputs.glob(f"*/*/{CONFIG}")) and not any(outputs.glob(f"*/*/*/{CONFIG}")):
        raise ValueError(f"{str(outputs)!r} holds no runs: train one, or give outputs=<folder of runs>")
    folders = find_runs(options.runs or [str(outputs)], options.outputs)
    entries = with_queue([examine(folder) for folder in folders])
    entries.sort(key=lambda e: float("inf") if e.age is None else e.age)
    if options.state:
        states = sorted({entry.state for entry in entries})
        entries = [entry for entry in entries if entry.state == options.state]
        if not entries:
            raise ValueError(f"no run is {options.state}: there are runs {', '.join(states)}")
    console = Console()
    base = outputs.resolve()
    inside = all(base in entry.folder.parents for entry in entries)
    shown = table(entries, base if inside else Path.cwd())
    if not console.is_terminal:  # a pipe has no width; a line is a run
        console = Console(width=Console(width=10_000).measure(shown).maximum)
    console.print(shown)
    for entry in entries:
        if entry.error:
            name = os.path.relpath(entry.folder, base)
            console.print(f"{name}: {entry.error}", soft_wrap=True, markup=False, highlight=False)
    if any(entry.state == KILLED for entry in entries):
        console.print("killed runs are resumed by the same command with resume=auto, or by resume=<folder>")
