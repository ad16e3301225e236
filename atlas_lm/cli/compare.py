"""Runs side by side, by chunk size: python -m atlas_lm compare outputs/stage2

Prints a table of all runs found; writes it to compare.md and draws the finished ones in compare.png.
"""

from __future__ import annotations

import glob
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from atlas_lm.cli.arguments import parse
from atlas_lm.cli.figures import new_figure, save
from atlas_lm.config.names import nearest
from atlas_lm.config.parsing import CONFIG, check_numbers, read_config, read_json
from atlas_lm.files import write_atomically

HEADINGS = ("run", "local chunks", "val ppl", "bits/byte", "tokens/s", "train time", "status")
WIDTH = 160  # of the table where the output is no terminal
FIGURES = ("val_loss", "val_bits_per_byte", "tokens_per_second", "train_seconds", "tokens", "val_bytes")  # of a report
UNFINISHED = "unfinished"  # no report: it still runs, or was killed


@dataclass
class Options:
    """Put runs side by side, sorted by the chunk sizes of their local memories."""

    runs: list[str] = field(default_factory=list)
    """Run folders, folders of runs, experiments, or patterns of them."""
    out: str = ""
    """Folder for compare.png and compare.md; else the one that holds all runs compared."""
    outputs: str = "outputs"
    """Folder of all runs."""


@dataclass(frozen=True)
class Run:
    """What the table says of one run; None for what is not known."""

    folder: Path
    chunks: tuple[int, ...]
    """Local chunk sizes, tokens; empty without a memory."""
    perplexity: float | None
    """Of the last validation, per token."""
    bits_per_byte: float | None
    tokens_per_second: float | None
    train_seconds: float | None
    status: str
    """finished | stopped early | interrupted | failed | unfinished"""
    terms: tuple[Any, ...] = ()
    """What two runs must share for their perplexities to be comparable: tokens trained on, bytes validated on."""

    @property
    def label(self) -> str:
        """The set of chunk sizes as shown."""
        return ", ".join(map(str, self.chunks)) if self.chunks else "no memory"

    @property
    def finished(self) -> bool:
        """Whether it trained to its end and has a finite loss."""
        return self.status == "finished" and self.perplexity is not None


def find_runs(names: Sequence[str], outputs: str = "outputs") -> list[Path]:
    """The run folders that names stand for: run folders, folders of runs up to two levels up, experiments, patterns.

    Each once, whatever links point to it. ValueError naming what there is instead, for a name without a run.
    """
    if not names:
        raise ValueError(f"no run is named: give run folders or folders of runs; {_available(Path(outputs))}")
    found: dict[Path, None] = {}
    for name in names:
        matches = [Path(match) for match in sorted(glob.glob(name))] or [Path(outputs) / name]
        runs = [run for match in matches for run in _runs_in(match)]
        if not runs:
            here = matches[0] if matches[0].is_dir() else Path(outputs)
            known = [p.name for p in here.iterdir()] if here.is_dir() else []
            raise ValueError(f"no run {name!r}{nearest(Path(name).name, known)}; {_available(here)}")
        found.update(dict.fromkeys(run.resolve() for run in runs))
    return list(found)


def _runs_in(folder: Path) -> list[Path]:
    if (folder / CONFIG).is_file():
        return [folder]
    below = sorted([*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")])
    return [path.parent for path in below if not path.parent.name.startswith(".")]


def _available(folder: Path) -> str:
    if not folder.is_dir():
        return f"{str(folder)!r} does not exist: train a run first"
    known = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return f"{str(folder)!r} has {', '.join(known)}" if known else f"{str(folder)!r} has no runs yet: train one first"


def read_run(folder: Path) -> Run:
    """One run from its config.yaml and, once it has ended, its report.json. ValueError: one of them is broken."""
    config = read_config(folder / CONFIG)
    chunks = OmegaConf.select(config, "model.local_chunks", default=[])
    memory = OmegaConf.select(config, "model.memory", default="atlas")
    report = _report(folder / "report.json")
    check_numbers(report, FIGURES, folder / "report.json")
    if not OmegaConf.is_list(chunks) and not isinstance(chunks, list):
        raise ValueError(f"{folder / CONFIG}: model.local_chunks is {chunks!r} and must be a list: correct it")
    loss = report.get("val_loss")
    return Run(
        folder,
        () if memory == "none" else tuple(int(chunk) for chunk in chunks),
        math.exp(loss) if loss is not None and loss < 700 else None,
        report.get("val_bits_per_byte"),
        report.get("tokens_per_second"),
        report.get("train_seconds"),
        str(report.get("status", UNFINISHED)),
        (report.get("tokens"), report.get("val_bytes")),
    )


def _report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        report = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): delete it to see the run as unfinished") from None
    if not isinstance(report, dict):
        raise ValueError(f"{path} is no report: delete it to see the run as unfinished")
    return report


def by_chunk_size(runs: Sequence[Run]) -> list[Run]:
    """Sorted by the largest chunk, then the others, then the folder; those without a memory last."""
    return sorted(runs, key=lambda run: (not run.chunks, sorted(run.chunks, reverse=True), run.folder))


def cells(run: Run, base: Path) -> tuple[str, ...]:
    """One row under HEADINGS; the folder as seen from `base`."""
    return (
        os.path.relpath(run.folder, base),
        run.label,
        _shown(run.perplexity, ".3f"),
        _shown(run.bits_per_byte, ".3f"),
        _shown(run.tokens_per_second, ",.0f"),
        _time(run.train_seconds),
        run.status,
    )


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def remarks(runs: Sequence[Run], base: Path) -> list[str]:
    """What a reader of the table has to know: runs that did not finish, and figures that cannot be compared."""
    lines = [
        f"{os.path.relpath(run.folder, base)}: {run.status}, not drawn" for run in runs if run.status != "finished"
    ]
    lines += [
        f"{os.path.relpath(run.folder, base)}: no finite validation loss, not drawn"
        for run in runs
        if run.status == "finished" and not run.finished
    ]
    for i, what in enumerate(("tokens trained on", "bytes validated on")):
        values = sorted({run.terms[i] for run in runs if run.finished and run.terms[i] is not None})
        if len(values) > 1:
            lines.append(f"mind: the runs differ in {what} ({', '.join(f'{v:,}' for v in values)})")
    return lines


def markdown(runs: Sequence[Run], base: Path) -> str:
    """compare.md: the table and the remarks below it."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(cells(run, base) for run in runs)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    below = "\n".join(f"- {line}" for line in remarks(runs, base))
    return f"# Runs by chunk size\n\n{table}\n" + (f"\n{below}\n" if below else "")


def draw(runs: Sequence[Run], path: Path) -> None:
    """compare.png: validation perplexity and tokens per second of the finished runs against their largest chunk."""
    figure = new_figure(9, 3.6)
    drawn = [run for run in runs if run.finished]
    panels = {"validation perplexity": "perplexity", "tokens per second": "tokens_per_second"}
    for axes, (title, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        shown = [run for run in drawn if getattr(run, value) is not None]
        points = [(max(r.chunks), getattr(r, value), r.label * (len(r.chunks) > 1)) for r in shown if r.chunks]
        places = sorted({x for x, _, _ in points})
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            marker="o",
            linestyle="-" if len(places) == len(points) else "none",  # no line through several runs of one size
        )
        for x, y, label in points:
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
        for run in shown:
            if not run.chunks:
                axes.axhline(getattr(run, value), color="grey", linestyle=":", label="no memory")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(x) for x in places])
        axes.set_xticks([], minor=True)
        axes.margins(0.12)
        axes.set(xlabel="largest local chunk, tokens", ylabel=title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        if not drawn:
            axes.text(0.5, 0.5, "no finished run", ha="center", transform=axes.transAxes)
    save(figure, path)


def compare(folders: Sequence[Path], out: Path | None = None, console: Console | None = None) -> list[Run]:
    """Print, write and draw the comparison of run folders; returns the runs as sorted.

    `out`: where compare.png and compare.md go; the innermost folder that holds all runs if None.
    """
    runs = by_chunk_size([read_run(folder) for folder in folders])
    base = Path(os.path.commonpath([run.folder.parent for run in runs]))
    out = base if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "compare.md", markdown(runs, base))
    draw(runs, out / "compare.png")
    table = Table(box=SIMPLE_HEAD)
    for i, heading in enumerate(HEADINGS):  # a narrow terminal folds the first column, and cuts none
        edge = i in (0, len(HEADINGS) - 1)
        table.add_column(heading, overflow="fold", no_wrap=i > 0, justify="left" if edge else "right")
    for run in runs:
        table.add_row(*cells(run, base), style=None if run.finished else "yellow")
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    for line in (*remarks(runs, base), f"wrote {out / 'compare.png'} and {out / 'compare.md'}"):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return runs


def main(arguments: list[str]) -> None:
    """See the module. ValueError: bad arguments, or a name without a run."""
    options = parse(Options, arguments, "python -m atlas_lm compare")
    compare(find_runs(options.runs, options.outputs), Path(options.out) if options.out else None)
