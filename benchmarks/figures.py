"""The README's table of figures, from the newest finished runs: python -m benchmarks.figures [--write]

Reads the runs of RUNS and what `python -m atlas_lm gates` found of them; trains nothing. --write puts the table between
the markers in README.md and docs/results/quality.md, and the numbers into docs/results/figures.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from atlas_lm.files import ROOT, write_atomically
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.runs.resolve import resolve_run

BEGIN, END = "<!-- figures: python -m benchmarks.figures --write -->", "<!-- end of figures -->"
PAGES = ("README.md", "docs/results/quality.md")
NUMBERS = "docs/results/figures.json"
HEAD = "| what | figure | command |\n|---|---|---|"
EQUAL_TIME = "stage1_twin_equal_time"
RUNS = {  # experiment → the command that makes its run
    "stage1": "python train.py +experiment=stage1",
    "stage1_twin": "python train.py +experiment=stage1_twin",
    EQUAL_TIME: f"python train.py +experiment=stage1_twin optim.total_steps=2900 name={EQUAL_TIME}",
    "recall": "python train.py +experiment=recall",
    "recall_twin": "python train.py +experiment=recall_twin",
    "stage2": "python train.py +experiment=stage2",
}
GATES = {"stage1": "phase2", "stage2": "phase4"}


class Figure(NamedTuple):
    """One row: what it is, how it is shown, the numbers that it shows, and the command that made it."""

    what: str
    shown: str
    values: list[float]
    command: str


class RunArtifacts(NamedTuple):
    """What the newest finished runs say of themselves."""

    reports: dict[str, dict[str, Any]]  # by experiment
    gates: dict[str, dict[str, dict[str, Any]]]  # by experiment, then by the gate's id
    contribution: float  # the last memory_contribution/perplexity_rise of Stage 1
    folders: dict[str, str]  # by experiment, the run folder's name


def collect(outputs: str = "outputs") -> RunArtifacts:
    """Read the runs. ValueError or OSError, naming it, where one is missing or was not judged."""
    reports, gates, folders = {}, {}, {}
    for name, command in RUNS.items():
        try:
            folder = resolve_run(name, outputs)
        except ValueError as error:
            raise ValueError(f"{error}; it comes from {command}") from None
        folders[name] = folder.resolve().name
        reports[name] = json.loads((folder / "report.json").read_text())
        if name in GATES:
            found = json.loads((folder / "exit_gates.json").read_text())[GATES[name]]
            gates[name] = {gate["id"]: gate for gate in found}
    rows = read_rows(resolve_run("stage1", outputs) / "metrics.jsonl")
    contributions = [
        row["memory_contribution/perplexity_rise"]
        for row in rows
        if row.get("memory_contribution/perplexity_rise") is not None
    ]
    return RunArtifacts(reports, gates, contributions[-1], folders)


def figures(found: RunArtifacts) -> list[Figure]:
    """The rows of the table."""
    stage1, twin, equal, recall, blind, stage2 = (found.reports[name] for name in RUNS)
    second, fourth = found.gates["stage1"], found.gates["stage2"]
    one, two = (f"python -m atlas_lm gates {GATES[name]} run={name}" for name in GATES)

    def passed(gates: dict[str, dict[str, Any]]) -> tuple[str, list[float]]:
        count = sum(gate["passed"] for gate in gates.values())
        return f"**{count}/{len(gates)}**", [count, len(gates)]

    def row(what: str, value: float, spec: str, command: str, bold: bool = False) -> Figure:
        shown = format(value, spec)
        return Figure(what, f"**{shown}**" if bold else shown, [value], command)

    def minutes(what: str, run: dict[str, Any], command: str) -> Figure:
        value = run["train_seconds"] / 60
        return Figure(what, f"{value:.1f} min", [value], command)

    rates = [stage1["tokens_per_second"], twin["tokens_per_second"]]
    return [
        row(f"held-out source ({stage1['val_bytes']:,} bytes), bits per byte", stage1["val_bits_per_byte"], ".3f",
            RUNS["stage1"], bold=True),
        row("the same bytes, gzip -9", stage1["gzip_bits_per_byte"], ".3f", "the same"),
        row("the same bytes, xz -9e", stage1["xz_bits_per_byte"], ".3f", "the same"),
        row(f"no memory, same steps, {twin['parameters']:,} parameters instead of {stage1['parameters']:,}",
            twin["val_bits_per_byte"], ".3f", RUNS["stage1_twin"]),
        row(f"no memory, **equal time**: {equal['steps']:,} steps in {equal['train_seconds'] / 60:.1f} min",
            equal["val_bits_per_byte"], ".3f", RUNS[EQUAL_TIME], bold=True),
        minutes(f"training time, {stage1['steps']:,} steps, {stage1['tokens']:,} bytes, validation included", stage1,
                RUNS["stage1"]),
        Figure("tokens per second (no memory)", f"{rates[0]:,.0f} ({rates[1]:,.0f})", rates, "both"),
        row("recall two windows back, 16 pairs", recall["recall_accuracy"], ".3f", RUNS["recall"], bold=True),
        row("recall, no memory (chance 0.016)", blind["recall_accuracy"], ".3f", RUNS["recall_twin"]),
        minutes("training time of recall", recall, RUNS["recall"]),
        row("perplexity without the memory's output, as a multiple", 1 + found.contribution, ".2f", RUNS["stage1"]),
        Figure("exit gates of Stage 1", *passed(second), one),
        row("needle after 100 pairs, gates open, mean cosine", second["G2-5"]["measured"], ".3f", "the same"),
        Figure("exit gates of Stage 2", *passed(fourth), two),
        row("needle after Stage 2, at chunk 1", fourth["G4-6"]["measured"], ".3f", "the same"),
        row("spread of the perplexity over chunk sizes 1 to 64", fourth["G4-4"]["measured"], ".1%", "the same"),
        row("gates below 0.1 or above 0.9", fourth["G4-5"]["measured"], ".1%", "the same"),
        minutes(f"training time of Stage 2, {stage2['steps']} steps, chunk 32 to 1", stage2, RUNS["stage2"]),
    ]  # fmt: skip


def table(rows: list[Figure]) -> str:
    """The table in Markdown."""

    def cell(command: str) -> str:
        return f"`{command}`" if command.startswith("python") else command

    return "\n".join([HEAD, *(f"| {r.what} | {r.shown} | {cell(r.command)} |" for r in rows)])


def inserted(page: str, text: str) -> str:
    """`page` with `text` between the markers. ValueError: it has not exactly one of each."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs one line {BEGIN!r} and, after it, one {END!r}")
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def numbers(found: RunArtifacts, rows: list[Figure]) -> str:
    """figures.json."""
    values = [{"what": r.what.replace("**", ""), "values": r.values, "command": r.command} for r in rows]
    return json.dumps({"runs": found.folders, "figures": values}, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the pages and the json, beside printing it")
    parser.add_argument("--outputs", default="outputs", help="folder of all runs")
    asked = parser.parse_args(arguments)
    found = collect(asked.outputs)
    rows = figures(found)
    print(table(rows))
    if asked.write:
        for page in PAGES:
            write_atomically(root / page, inserted((root / page).read_text(encoding="utf-8"), table(rows)))
        write_atomically(root / NUMBERS, numbers(found, rows))


if __name__ == "__main__":
    main()
