"""What far text is worth to each model of benchmarks.worth: python -m benchmarks.context

Over all seeds, on the same held-out sequences, of the runs at equal time: the context gain (how far the loss of the
last window falls when a model sees the whole sequence and not only what attention reaches at the experiment's window),
and the share of full attention's gain that it is. At equal steps and at equal time: the loss by position against the
twin without a memory, sequence by sequence. Trains nothing. --write puts the tables and the pictures into docs.
"""

# S seeds, N sequences, T tokens

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_lm.cli.figures import new_figure, save
from atlas_lm.evaluation.bootstrap import interval
from atlas_lm.evaluation.losses import losses
from atlas_lm.evaluation.subject import Subject
from atlas_lm.evaluation.tables import Table
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.model.probes import attention_reach
from benchmarks.figures import inserted

RESULTS = Path("docs") / "results"
PAGE, NUMBERS, PICTURE = RESULTS / "context.md", RESULTS / "context.json", Path("docs") / "context.png"
EQUAL = {"steps": "equal steps", "time": "equal time"}
BEGIN = "<!-- context: python -m benchmarks.context --write -->"
TWIN, FULL = "no memory", "full attention"


class Losses(NamedTuple):
    """Of one model, in nats per token."""

    whole_SNT: Tensor  # of whole sequences
    gain_SNT: Tensor  # of the last window: what it loses when it sees no further than `near` tokens


def edges(near: int, length: int) -> list[int]:
    """Where bins of positions begin: 0, then from what attention reaches in steps that double."""
    found = [0, near]
    while found[-1] < length:
        found.append(min(2 * found[-1], length))
    return found


@torch.no_grad()
def by_position(runs: list[str], sequences: int) -> Tensor:
    """Losses (S, N, T) of a model's runs, one for each seed."""
    subjects = [Subject(run) for run in runs]
    return torch.stack([losses(s.model, s.text(s.trained_length, sequences), lambda _: None) for s in subjects])


@torch.no_grad()
def measure(runs: list[str], near: int, window: int, sequences: int) -> Losses:
    """Of a model's runs, one for each seed."""
    whole, gain = [], []
    for run in runs:
        subject = Subject(run)
        text = subject.text(subject.trained_length, sequences)
        found = losses(subject.model, text, lambda _: None)
        seen = losses(subject.model, text.last(near), lambda _: None, window)
        whole.append(found)
        gain.append(seen - found[:, -window:])
    return Losses(torch.stack(whole), torch.stack(gain))


def gains(found: dict[str, Losses], near: int) -> Table:
    """Context gain, and its share of full attention's. Intervals are over sequences, each the mean of its seeds."""
    length = next(iter(found.values())).whole_SNT.size(2)
    table = Table("gain", f"Context gain, {near:,} → {length:,} tokens", "nats per token", "", "+.4f")
    for name, of in found.items():
        table.add(name, "all seeds", interval(of.gain_SNT.nanmean(0)))
        for seed, gain_NT in enumerate(of.gain_SNT):
            table.add(name, f"seed {seed}", interval(gain_NT))
    if FULL not in found:
        table.notes.append("- Full attention was not trained: what this text offers is not known.")
        return table
    offered = table.cells[FULL]["all seeds"]
    if offered.low <= 0:
        table.notes.append("- Full attention gains nothing on this text: it tests no memory.")
    else:
        means = {name: cells["all seeds"].mean for name, cells in table.cells.items() if name != FULL}
        table.notes += [
            f"- {name}: {mean / offered.mean:.0%} of what full attention gains" for name, mean in means.items()
        ]
    return table


def against_twin(found: dict[str, Tensor], bins: list[int], equal: str) -> Table:
    """Loss (S, N, T) less the twin's, by position, sequence by sequence; below 0 is better than the twin."""
    title = f"Loss by position less that of the model without memory, at {EQUAL[equal]}"
    table = Table(f"position_{equal}", title, "nats per token", "position", "+.4f")
    twin = found[TWIN].nanmean(0)
    for name, whole_SNT in found.items():
        if name == TWIN:
            continue
        difference = whole_SNT.nanmean(0) - twin
        for start, end in pairwise(bins):
            table.add(name, f"{start}–{end - 1}", interval(difference[:, start:end]), (start + end) / 2)
    return table


def draw(tables: list[Table], path: Path) -> None:
    """The pictures of `against_twin`, side by side."""
    figure = new_figure(11, 4.2)
    for table, axes in zip(tables, figure.subplots(1, len(tables), sharey=True), strict=True):
        table.draw(axes)
        axes.axhline(0, color="black", linewidth=0.8)
    save(figure, path)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worth", type=Path, default=Path("outputs/worth"), help="--out of benchmarks.worth")
    parser.add_argument("--sequences", type=int, default=160)
    parser.add_argument("--write", action="store_true", help="into docs/results")
    options = parser.parse_args(arguments)
    path = options.worth / "worth.json"
    if not path.is_file():
        raise SystemExit(f"there is no {path}: it comes from python -m benchmarks.worth --out {options.worth}")
    known: dict[str, Any] = json.loads(path.read_text())
    if TWIN not in known:
        raise SystemExit(f"{path} has no model {TWIN!r}, with which the others are compared")
    config = Subject(known[TWIN]["time"][0]["run"]).model.config
    near = config.window + attention_reach(config)
    length = Subject(known[TWIN]["time"][0]["run"]).trained_length
    if near >= length:
        raise SystemExit(f"attention reaches {near} tokens, all of a sequence of {length}: nothing lies beyond it")
    found = {
        name: measure([report["run"] for report in of["time"]], near, config.window, options.sequences)
        for name, of in known.items()
    }
    bins = edges(near, found[TWIN].whole_SNT.size(2))
    at_equal_time = {name: of.whole_SNT for name, of in found.items()}
    at_equal_steps = {}
    for name, of in known.items():
        runs = {equal: [report["run"] for report in of[equal]] for equal in EQUAL}
        same = runs["steps"] == runs["time"]
        at_equal_steps[name] = at_equal_time[name] if same else by_position(runs["steps"], options.sequences)
    gain = gains(found, near)
    positions = [against_twin(at_equal_steps, bins, "steps"), against_twin(at_equal_time, bins, "time")]
    text = "\n".join([gain.markdown(), *(table.markdown() for table in positions)])
    print(text)
    if options.write:
        page = (root / PAGE).read_text(encoding="utf-8")
        write_atomically(root / PAGE, inserted(page, text.strip(), BEGIN))
        numbers = {"seeds": len(found[TWIN].whole_SNT), "gain": gain.as_json()}
        numbers |= {f"position_{equal}": table.as_json() for equal, table in zip(EQUAL, positions, strict=True)}
        write_atomically(root / NUMBERS, json.dumps(numbers, indent=1) + "\n")
        draw(positions, root / PICTURE)


if __name__ == "__main__":
    main()
