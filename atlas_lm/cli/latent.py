"""What a predictor of the next vector is worth: python -m atlas_lm latent five_cat run=latent_p2

Prints tables; writes five_cat.md, five_cat.json and five_cat.png; of split=validation five_cat_validation.*.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from atlas_lm.cli import latent_tables as tables
from atlas_lm.cli.arguments import HELP, parse
from atlas_lm.cli.figures import save
from atlas_lm.config.names import nearest
from atlas_lm.evaluation.bootstrap import interval
from atlas_lm.files import write_atomically
from atlas_lm.latent import criteria
from atlas_lm.latent.load import Loaded, load
from atlas_lm.latent.rows import BEATEN, Bench, Row, verdict
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.training.trainer import prepare_process

COMMAND = "python -m atlas_lm latent five_cat"
SPLITS = ("test", "validation")


@dataclass
class Options:
    """Test runs of next-vector prediction beside an oracle and baselines. Exit code 0 when each is better than the last
    frame and ridge in contrastive accuracy and R@5, their intervals too, and has at least half the data's effective
    rank; else 1. The seed's thresholds are reported, and decide nothing."""

    run: str
    """Run folders or experiments of the same data, with commas between them: run=latent_p1,latent_p2."""
    split: str = "test"
    """Documents to test on: test, or validation, by which runs were chosen."""
    samples: int = 5000
    """Windows of the ablations and the roll-out."""
    out: str = ""
    """Folder for what is written; that of the first run if none is given."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split} is unknown{nearest(self.split, SPLITS)}: use test or validation")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")


def main(arguments: Sequence[str]) -> None:
    """See the module. ValueError: bad arguments, no such run, or runs of different data."""
    if not arguments or arguments[0] in HELP:
        parse(Options, ["--help"], COMMAND)
    if arguments[0] != "five_cat":
        raise ValueError(f"latent has no {arguments[0]!r}: give five_cat, as in {COMMAND} run=latent_p2")
    options = parse(Options, list(arguments[1:]), COMMAND)
    prepare_process(seed=0)
    if not five_cat(options):
        raise SystemExit(1)


def five_cat(options: Options) -> bool:
    """Test, print and write; whether every run holds."""
    runs = {name: load(name, options.outputs) for name in dict.fromkeys(options.run.split(","))}
    first = next(iter(runs.values()))
    _check_same_data(runs, first)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=7 + 3 * len(runs))

        def tick(name: str) -> None:
            progress.update(task, advance=1, description=name)

        bench = Bench(first.source, options.split, options.samples)
        baselines = bench.baselines(tick)
        models = {name: bench.model(name, run.module.predictor(), tick) for name, run in runs.items()}
    rows = [*baselines, *(row for found in models.values() for row in found)]
    out = Path(options.out) if options.out else first.folder
    text, content, holds = _written(bench, rows, {name: found[0] for name, found in models.items()}, runs)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    name = "five_cat" if options.split == "test" else f"five_cat_{options.split}"
    write_atomically(out / f"{name}.md", text + "\n")
    write_atomically(out / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    chosen = [row for row in rows if row.name in ("oracle", "last frame", "context mean", "ridge", *runs)]
    save(tables.sweep_figure(chosen, bench.context), out / f"{name}.png")
    print(f"wrote {out / name}.md, {name}.json and {name}.png")
    return holds


def _check_same_data(runs: dict[str, Loaded], first: Loaded) -> None:
    wanted = first.source.frames.fingerprint(), first.source.context
    prints = {name: (run.source.frames.fingerprint(), run.source.context) for name, run in runs.items()}
    others = [name for name, found in prints.items() if found != wanted]
    if others:
        raise ValueError(f"run={others[0]} was trained on other vectors than {next(iter(runs))}: test them apart")


def _written(
    bench: Bench, rows: Sequence[Row], models: dict[str, Row], runs: dict[str, Loaded]
) -> tuple[str, dict[str, Any], bool]:
    """The Markdown, the JSON, and whether every model holds."""
    audit = bench.source.audit
    parts = [f"# Five tests on {len(bench.held_out)} documents of the {bench.split} split", "", audit.line(), ""]
    parts += [f"warning: {alarm}" for alarm in audit.alarms()]
    parts += ["## Held-out text", "", tables.measures_table(rows, other=False), ""]
    if bench.other:
        parts += ["## Out of domain", "", tables.measures_table(rows, other=True), ""]
    beaten = [row for row in rows if row.name in BEATEN]
    verdicts, judged, all_hold = [], {}, True
    for name, row in models.items():
        holds, words = verdict(row, beaten, interval)
        found = criteria.judge(read_rows(runs[name].folder / "metrics.jsonl"), runs[name].module.settings.head)
        parts += [f"## {name}: the seed's thresholds", "", tables.gates_table(row.gates), ""]
        parts += [f"## {name}: the seed's criteria by epoch", "", tables.criteria_table(found), ""]
        passed = sum(row.passed.values())
        head = "HOLDS" if holds else "DOES NOT HOLD"
        verdicts.append(f"verdict: {name} {head}: {'; '.join(words)}; {passed} of the seed's 5 tests passed")
        judged[name] = {"holds": holds, "reasons": words, "criteria": [c._asdict() for c in found]}
        all_hold &= holds
    content = {
        "split": bench.split, "audit": audit.values(), "rows": [tables.as_json(row) for row in rows],
        "verdicts": tables.finite(judged), "runs": {name: str(run.folder) for name, run in runs.items()},
    }  # fmt: skip
    return "\n".join([*parts, *verdicts]), content, all_hold
