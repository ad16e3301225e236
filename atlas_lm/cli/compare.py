"""Runs side by side, by chunk size: python -m atlas_lm compare outputs/stage2

Prints a table of all runs found; writes it to compare.md and draws the finished ones in compare.png.
"""

import glob
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from atlas_lm.cli.arguments import parse
from atlas_lm.cli.figures import new_figure, save
from atlas_lm.config.names import nearest
from atlas_lm.config.parsing import CONFIG, check_numbers, read_config, read_json
from atlas_lm.files import write_atomically

FIGURES = ("val_loss", "val_bits_per_byte", "tokens_per_second", "train_seconds", "tokens", "val_bytes")  # of a report
COMPARABLE = {"tokens": "tokens trained on", "val_bytes": "bytes validated on"}  # must be alike in two runs
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


class Run(NamedTuple):
    """One run: its local chunk sizes (none without a memory), and what its report says."""

    folder: Path
    chunks: tuple[int, ...]
    report: dict[str, Any]

    @property
    def status(self) -> str:
        return str(self.report.get("status", UNFINISHED))

    @property
    def perplexity(self) -> float | None:
        loss = self.report.get("val_loss")
        return math.exp(loss) if loss is not None and loss < 700 else None

    @property
    def finished(self) -> bool:
        """Whether it trained to its end and has a finite loss."""
        return self.status == "finished" and self.perplexity is not None

    @property
    def label(self) -> str:
        return ", ".join(map(str, self.chunks)) or "no memory"


def find_runs(names: Sequence[str], outputs: str = "outputs") -> list[Path]:
    """The run folders that names stand for: run folders, folders of runs up to two levels up, experiments, patterns.

    Each once, whatever links point to it. ValueError naming what there is instead, for a name without a run.
    """
    found: dict[Path, None] = {}
    for name in names or [""]:
        matches = [Path(match) for match in sorted(glob.glob(name))] or [Path(outputs) / name] if name else []
        runs = [path.parent for match in matches for depth in ("", "*/", "*/*/") for path in match.glob(depth + CONFIG)]
        if not runs:
            here = matches[0] if matches and matches[0].is_dir() else Path(outputs)
            known = sorted(p.name for p in here.glob("[!.]*") if p.is_dir())
            there = f"has {', '.join(known)}" if known else "has no runs yet: train one first"
            there = there if here.is_dir() else "does not exist: train a run first"
            what = f"no run {name!r}{nearest(Path(name).name, known)}" if name else "no run is named: give run folders"
            raise ValueError(f"{what}; {str(here)!r} {there}")
        found.update({run.resolve(): None for run in runs if not run.name.startswith(".")})
    return list(found)


def read_run(folder: Path) -> Run:
    """One run from its config.yaml and, once it has ended, its report.json. ValueError: one of them is broken."""
    config, path = read_config(folder / CONFIG), folder / "report.json"
    chunks = OmegaConf.select(config, "model.local_chunks", default=[])
    if not OmegaConf.is_list(chunks) and not isinstance(chunks, list):
        raise ValueError(f"{folder / CONFIG}: model.local_chunks is {chunks!r} and must be a list: correct it")
    if OmegaConf.select(config, "model.memory") == "none":
        chunks = []
    try:
        report = read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): delete it to see the run as unfinished") from None
    if not isinstance(report, dict):
        raise ValueError(f"{path} is no report: delete it to see the run as unfinished")
    check_numbers(report, FIGURES, path)
    return Run(folder, tuple(int(chunk) for chunk in chunks), report)


def by_chunk_size(runs: Sequence[Run]) -> list[Run]:
    """Sorted by the largest chunk, then the others, then the folder; those without a memory last."""
    return sorted(runs, key=lambda run: (not run.chunks, sorted(run.chunks, reverse=True), run.folder))


def cells(run: Run, base: Path) -> dict[str, str]:
    """One row of the table; the folder as seen from `base`."""

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    seconds = run.report.get("train_seconds")
    return {
        "run": os.path.relpath(run.folder, base).replace("|", "\\|"),
        "local chunks": run.label,
        "val ppl": shown(run.perplexity, ".3f"),
        "bits/byte": shown(run.report.get("val_bits_per_byte"), ".3f"),
        "tokens/s": shown(run.report.get("tokens_per_second"), ",.0f"),
        "train time": "–" if seconds is None else str(timedelta(seconds=round(seconds))),
        "status": run.status,
    }


def remarks(runs: Sequence[Run], base: Path) -> list[str]:
    """What a reader of the table has to know: runs that are not drawn, and figures that cannot be compared."""
    lines = [
        f"{os.path.relpath(run.folder, base)}: "
        f"{run.status if run.status != 'finished' else 'no finite validation loss'}, not drawn"
        for run in runs
        if not run.finished
    ]
    for name, what in COMPARABLE.items():
        values = sorted({run.report[name] for run in runs if run.finished and run.report.get(name) is not None})
        if len(values) > 1:
            lines.append(f"mind: the runs differ in {what} ({', '.join(f'{v:,}' for v in values)})")
    return lines


def markdown(runs: Sequence[Run], base: Path) -> str:
    """The table and the remarks below it, for compare.md and the terminal."""
    table = [cells(run, base) for run in runs]
    wide = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    rows = [{name: name for name in wide}, {name: "-" * width for name, width in wide.items()}, *table]
    lines = ["| " + " | ".join(row[name].ljust(width) for name, width in wide.items()) + " |" for row in rows]
    return "\n".join(["# Runs by chunk size", "", *lines, "", *(f"- {line}" for line in remarks(runs, base)), ""])


def draw(runs: Sequence[Run], path: Path) -> None:
    """compare.png: validation perplexity and tokens per second of the finished runs, by their largest chunk."""
    figure, drawn = new_figure(9, 3.6), [run for run in runs if run.finished]
    panels: dict[str, Callable[[Run], Any]] = {
        "validation perplexity": lambda run: run.perplexity,
        "tokens per second": lambda run: run.report.get("tokens_per_second"),
    }
    for axes, (title, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        shown = [run for run in drawn if value(run) is not None]
        points = [run for run in shown if run.chunks]
        sizes = [max(run.chunks) for run in points]
        line = "-" if len(set(sizes)) == len(sizes) else "none"  # no line through several runs of one size
        axes.plot(sizes, [value(run) for run in points], marker="o", linestyle=line)
        for run, size in zip(points, sizes, strict=True):
            axes.annotate(run.label * (len(run.chunks) > 1), (size, value(run)), fontsize=8)
        for run in shown:
            if not run.chunks:
                axes.axhline(value(run), color="grey", linestyle=":", label="no memory")
                axes.legend(fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(sizes)), map(str, sorted(set(sizes))), minor=False)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="largest local chunk, tokens", ylabel=title)
        if not drawn:
            axes.text(0.5, 0.5, "no finished run", ha="center", transform=axes.transAxes)
    save(figure, path)


def compare(folders: Sequence[Path], out: Path | None = None) -> list[Run]:
    """Print, write and draw the comparison of run folders; returns the runs as sorted.

    `out`: where compare.png and compare.md go; the innermost folder that holds all runs if None.
    """
    runs = by_chunk_size([read_run(folder) for folder in folders])
    base = Path(os.path.commonpath([run.folder.parent for run in runs]))
    out = base if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(runs, base)
    write_atomically(out / "compare.md", text)
    draw(runs, out / "compare.png")
    print(f"{text}\nwrote {out / 'compare.png'} and {out / 'compare.md'}")
    return runs


def main(arguments: list[str]) -> None:
    """See the module. ValueError: bad arguments, or a name without a run."""
    options = parse(Options, arguments, "python -m atlas_lm compare")
    compare(find_runs(options.runs, options.outputs), Path(options.out) if options.out else None)
