"""The README's table of figures, from the newest finished runs: python -m benchmarks.figures [--write]

Reads the runs of RUNS, what `python -m atlas_lm gates` found of them, and what `benchmarks.worth --write` left; trains
nothing. --write puts the table between the markers in README.md and docs/results/quality.md, and the numbers into
docs/results/figures.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from atlas_lm.files import ROOT, write_atomically
from atlas_lm.runs.resolve import resolve_run

BEGIN, END = "<!-- figures: python -m benchmarks.figures --write -->", "<!-- end of figures -->"
PAGES = ("README.md", "docs/results/quality.md")
NUMBERS = "docs/results/figures.json"
WORTH = "docs/results/worth.json"  # of `python -m benchmarks.worth --write`
SEEDS = 3  # that the README's first row asks for
HEAD = "| what | figure | command |\n|---|---|---|"
RUNS = {  # experiment → the command that makes its run
    "stage1": "python train.py +experiment=stage1",
    "stage1_twin": "python train.py +experiment=stage1_twin",
    "recall": "python train.py +experiment=recall",
    "recall_twin": "python train.py +experiment=recall_twin",
    "stage2": "python train.py +experiment=stage2",
}
GATES = {"stage1": "phase2", "recall": "used", "stage2": "phase4"}


class Figure(NamedTuple):
    """One row: what it is, how it is shown, the numbers that it shows, and the command that made it."""

    what: str
    shown: str
    values: list[float]
    command: str


def collect(outputs: str = "outputs") -> dict[str, dict[str, Any]]:
    """What the newest finished runs say, by experiment: their report; their gates by id; `folder`, its name.

    ValueError or OSError, naming it, where a run is missing or was not judged.
    """
    found = {}
    for name, command in RUNS.items():
        try:
            folder = resolve_run(name, outputs)
        except ValueError as error:
            raise ValueError(f"{error}; it comes from {command}") from None
        found[name] = json.loads((folder / "report.json").read_text()) | {"folder": folder.name}
        if name in GATES:
            gates = json.loads((folder / "exit_gates.json").read_text())[GATES[name]]
            found[name]["gates"] = {gate["id"]: gate for gate in gates}
    return found


def equal_time(worth: dict[str, Any]) -> Figure:
    """The first row: what each model reaches in the time of the first one."""
    models = worth["models"]

    def shown(model: dict[str, Any]) -> str:
        mean, half = model["equal_time"]
        return f"{model['model']} **{mean:.3f}**" + ("" if half is None else f" ± {half:.3f}")

    what = f"**equal training time** ({models[0]['seconds'] / 60:.1f} min), {worth['seeds']} seeds, bits per byte"
    return Figure(what, ", ".join(map(shown, models)), [m["equal_time"][0] for m in models], worth["command"])


def figures(found: dict[str, dict[str, Any]], worth: dict[str, Any]) -> list[Figure]:
    """The rows of the table."""
    stage1, twin, recall, blind, stage2 = (found[name] for name in RUNS)
    one, asked, two = (f"python -m atlas_lm gates {GATES[name]} run={name}" for name in GATES)

    def row(what: str, value: float, form: str, command: str) -> Figure:
        return Figure(what, form.format(value), [value], command)

    def minutes(what: str, run: dict[str, Any], command: str) -> Figure:
        return row(what, run["train_seconds"] / 60, "{:.1f} min", command)

    def passed(what: str, run: dict[str, Any], command: str) -> Figure:
        count, of = sum(gate["passed"] for gate in run["gates"].values()), len(run["gates"])
        return Figure(what, f"**{count}/{of}**", [count, of], command)

    def measured(what: str, run: dict[str, Any], gate: str, form: str) -> Figure:
        return row(what, run["gates"][gate]["measured"], form, "the same")

    rates = [stage1["tokens_per_second"], twin["tokens_per_second"]]
    return [
        equal_time(worth),
        row(f"with memory, held-out source ({stage1['val_bytes']:,} bytes), bits per byte",
            stage1["val_bits_per_byte"], "**{:.3f}**", RUNS["stage1"]),
        row("the same bytes, gzip -9", stage1["gzip_bits_per_byte"], "{:.3f}", "the same"),
        row("the same bytes, xz -9e", stage1["xz_bits_per_byte"], "{:.3f}", "the same"),
        row(f"no memory, same steps, {twin['parameters']:,} parameters instead of {stage1['parameters']:,}",
            twin["val_bits_per_byte"], "{:.3f}", RUNS["stage1_twin"]),
        minutes(f"training time, {stage1['steps']:,} steps, {stage1['tokens']:,} tokens, validation included", stage1,
                RUNS["stage1"]),
        Figure("tokens per second (no memory)", f"{rates[0]:,.0f} ({rates[1]:,.0f})", rates, "both"),
        row("recall two windows back, 16 pairs", recall["recall_accuracy"], "**{:.3f}**", RUNS["recall"]),
        row("recall, no memory (chance 0.016)", blind["recall_accuracy"], "{:.3f}", RUNS["recall_twin"]),
        minutes("training time of recall", recall, RUNS["recall"]),
        row("context gain of Stage 1: what the memory's past is worth beyond attention's reach, nats per token",
            stage1["gates"]["used"]["measured"], "**{:+.3f}**", one),
        row("the same of recall", recall["gates"]["used"]["measured"], "{:+.3f}", asked),
        passed("exit gates of Stage 1", stage1, one),
        measured("needle after 100 pairs, gates open, mean cosine", stage1, "G2-5", "{:.3f}"),
        passed("exit gates of Stage 2", stage2, two),
        measured("needle after Stage 2, at chunk 1", stage2, "G4-6", "{:.3f}"),
        measured("spread of the perplexity over chunk sizes 1 to 64", stage2, "G4-4", "{:.1%}"),
        measured("gates below 0.1 or above 0.9", stage2, "G4-5", "{:.1%}"),
        minutes(f"training time of Stage 2, {stage2['steps']} steps, chunks shrink to one token", stage2,
                RUNS["stage2"]),
    ]  # fmt: skip


def table(rows: list[Figure]) -> str:
    """The table in Markdown."""
    commands = (f"`{r.command}`" if r.command.startswith("python") else r.command for r in rows)
    return "\n".join([HEAD, *(f"| {r.what} | {r.shown} | {c} |" for r, c in zip(rows, commands, strict=True))])


def inserted(page: str, text: str, begin: str = BEGIN) -> str:
    """`page` with `text` between the marker and the end after it. ValueError: not exactly one of each."""
    head, _, rest = page.partition(begin)
    if page.count(begin) != 1 or END not in rest:
        raise ValueError(f"the page needs one line {begin!r} and, after it, one {END!r}")
    return f"{head}{begin}\n{text}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the pages and the json, beside printing it")
    parser.add_argument("--outputs", default="outputs", help="folder of all runs")
    asked = parser.parse_args(arguments)
    found = collect(asked.outputs)
    worth = json.loads((root / WORTH).read_text())
    if worth["seeds"] < SEEDS:
        raise SystemExit(f"{WORTH} has {worth['seeds']} seed(s), a screening: python -m benchmarks.worth --write")
    rows = figures(found, worth)
    print(table(rows))
    if asked.write:
        for page in PAGES:
            write_atomically(root / page, inserted((root / page).read_text(encoding="utf-8"), table(rows)))
        values = [{"what": r.what.replace("**", ""), "values": r.values, "command": r.command} for r in rows]
        known = {"runs": {name: run["folder"] for name, run in found.items()}, "figures": values}
        write_atomically(root / NUMBERS, json.dumps(known, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
