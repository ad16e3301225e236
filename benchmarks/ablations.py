"""What each part of the memory is worth, before and after Stage 2 (TNT's ablations): python -m benchmarks.ablations

Trains Stage 1 of every variant of the default, and Stage 2 from each, at the experiments' own rates, `--seeds` times.
A variant without local memories has no chunks to shrink: its Stage 2 has the same steps without the schedule, and so
without the clipping that follows it; beside it stands the default trained so. What has finished is not made again.
--write puts the table into docs.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from atlas_lm.files import ROOT, write_atomically
from benchmarks import worth
from benchmarks.figures import inserted

PAGE, NUMBERS = Path("docs") / "results" / "ablations.md", Path("docs") / "results" / "ablations.json"
BEGIN = "<!-- ablations: python -m benchmarks.ablations --write -->"
SECOND_SEED = 100  # is added to the seed of Stage 2: another order of the text than Stage 1's
NO_SCHEDULE = ("~callbacks.chunk_size_scheduler", "~callbacks.proactive_clipping")


class Variant(NamedTuple):
    """Settings of both stages, and of Stage 2 alone."""

    settings: tuple[str, ...] = ()
    second: tuple[str, ...] = ()


VARIANTS = {
    "as it is": Variant(),
    "as it is, Stage 2 at Stage 1's chunks": Variant((), NO_SCHEDULE),
    "no global memory": Variant(("model.global_chunk=null",)),
    "no local memory": Variant(("model.local_chunks=[]",), NO_SCHEDULE),
    "two local memories": Variant(("model.local_chunks=[64,16]",)),
    "three local memories": Variant(("model.local_chunks=[64,32,16]",)),
    "no Q–K projection": Variant(("model.projection=false",)),
    "answers summed, as in TNT": Variant(("model.answers=sum",)),
}


Interval = tuple[float, float | None]  # mean over seeds, and half the interval of 95 %; None for one seed


class Row(NamedTuple):
    """Bits per byte, and what they differ by from the first variant's of the same seeds."""

    variant: str
    before: Interval
    after: Interval
    differs_before: Interval
    differs_after: Interval
    gain: float | None  # nats per token of Stage 1 from beyond attention's reach, mean over seeds; None: not measured


def train(out: Path, variant: str, seed: int, extra: list[str], quick: bool, jobs: int) -> tuple[Any, Any]:
    """The reports of both stages."""
    of = VARIANTS[variant]
    one = worth.setting("stage1", [*extra, *of.settings], quick, out, jobs)
    first = worth.train(one, "memory", one.steps, 1.0, seed, f"stage1 {variant}")
    from_there = [*extra, *of.settings, *of.second, f"init_from={first['run']}"]
    two = worth.setting("stage2", from_there, quick, out, jobs)
    return first, worth.train(two, "memory", two.steps, 1.0, seed + SECOND_SEED, f"stage2 {variant}")


def summary(found: dict[str, list[tuple[Any, Any]]]) -> list[Row]:
    """One row a variant."""
    rows: list[Row] = []
    figures = {
        variant: [[worth.figure_of(report) for report in stage] for stage in zip(*pairs, strict=True)]
        for variant, pairs in found.items()
    }
    base = next(iter(figures.values()))
    for variant, stages in figures.items():
        differences = [[a - b for a, b in zip(*both, strict=True)] for both in zip(stages, base, strict=True)]
        gains = [first["context_gain"] for first, _ in found[variant]]
        mean = None if None in gains else sum(gains) / len(gains)
        rows.append(Row(variant, *(interval(values) for values in (*stages, *differences)), mean))
    return rows


def interval(values: list[float]) -> Interval:
    """Over seeds."""
    mean, half = worth.interval(values)
    return mean, half if len(values) > 1 else None


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| variant | bits per byte after Stage 1 | after Stage 2 | against the first row, same seeds: Stage 1 "
             "| Stage 2 | context gain after Stage 1, nats |", "|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        gain = "–" if r.gain is None else f"{r.gain:+.3f}"
        differs = ("", "") if r is rows[0] else (difference(r.differs_before), difference(r.differs_after))
        cells = (r.variant, worth.shown(r.before), worth.shown(r.after), *differs, gain)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(found: Interval) -> str:
    """With its sign."""
    mean, half = found
    return f"{mean:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Train what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the steps")
    parser.add_argument("--out", type=Path, default=Path("outputs/ablations"))
    parser.add_argument("--set", nargs="*", default=[], dest="extra", help="settings of all runs")
    parser.add_argument("--write", action="store_true", help="into docs/results")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    out, seeds = options.out.absolute(), 1 if options.quick else options.seeds
    (out / "runs").mkdir(parents=True, exist_ok=True)
    asked = [(variant, seed) for seed in range(seeds) for variant in options.variants]
    with ThreadPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(lambda x: train(out, *x, options.extra, options.quick, options.jobs), asked))
    found = {
        variant: [pair for (name, _), pair in zip(asked, reports, strict=True) if name == variant]
        for variant in options.variants
    }
    rows = summary(found)
    print(table(rows))
    if options.write:
        command = "python -m benchmarks.ablations " + ("--quick" if options.quick else f"--seeds {seeds}")
        page = (root / PAGE).read_text(encoding="utf-8")
        write_atomically(root / PAGE, inserted(page, f"`{command}`\n\n{table(rows)}", BEGIN))
        content = {"command": command, "seeds": seeds, "rows": [row._asdict() for row in rows]}
        write_atomically(root / NUMBERS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
