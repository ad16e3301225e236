"""Which needles a deep memory answers, by chunk size and distance: python -m benchmarks.needle_chunks

Trains `+experiment=needles` with one deep local memory, at each chunk size of `--trained`, and asks S-NIAH-1 and
S-NIAH-2 at every chunk size from 64 to 1: of sequences of the training length, by how many windows of attention lie
between a question and the statement that answers it. What has finished is not trained again. --write puts tables and
picture into docs.
"""

# N examples

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from atlas_lm.cli.figures import new_figure, save
from atlas_lm.evaluation.bootstrap import Interval, share
from atlas_lm.evaluation.losses import chunk_size
from atlas_lm.evaluation.needles import TASKS, answered, examples
from atlas_lm.evaluation.subject import Subject
from atlas_lm.evaluation.tables import Table
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.runs.folder import finished_runs
from benchmarks.figures import inserted

RESULTS = Path("docs") / "results"
PAGE, NUMBERS, PICTURE = RESULTS / "chunks.md", RESULTS / "needle_chunks.json", Path("docs") / "needle_chunks.png"
BEGIN = "<!-- needle_chunks: python -m benchmarks.needle_chunks --write -->"
ASKED = "S-NIAH-1", "S-NIAH-2"
SIZES = 64, 32, 16, 8, 4, 2, 1
DISTANCES = 1, 2, 4, 8, 16  # windows: edges of the bins; a statement and its question fill one
DEEP = (
    "+experiment=needles", "model.network=gated_mlp", "model.update=gradient", "model.global_chunk=null",
    "model.half_life=1024", "model.rank=127", "data.source.long_share=0",
)  # fmt: skip


def trained(size: int, outputs: Path, steps: int) -> str:
    """The run at this chunk size, trained now unless there is one. RuntimeError: it did not finish."""
    name = f"needle_chunks_{size}_steps_{steps}"
    if not finished_runs(outputs / name):
        settings = [f"model.local_chunks=[{size}]", f"optim.total_steps={steps}", f"name={name}", "resume=auto"]
        command = [sys.executable, str(ROOT / "train.py"), *DEEP, *settings, f"paths.outputs={outputs}"]
        print("train:", name, file=sys.stderr, flush=True)
        if subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ).returncode:
            raise RuntimeError(f"{name} did not finish: see {outputs / name}")
    return str(finished_runs(outputs / name)[0])


def by_distance(hits_N: Tensor, windows_N: Tensor) -> dict[str, Interval]:
    """The share of answers in each bin that has an example."""
    found = {}
    for first, end in pairwise(DISTANCES):
        inside = (windows_N >= first) & (windows_N < end)
        if inside.any():
            found[f"{first}–{end}"] = share(hits_N[inside])
    return found


def measured(subject: Subject, size: int, task: str, count: int) -> Table:
    """Columns: chunk sizes; rows: distances."""
    text, distances_N = examples(subject, TASKS[task], subject.trained_length, count)
    windows = distances_N / subject.window
    table = Table(f"{task} {size}", f"{task}, trained at chunk {size}", "share of questions answered",
                  "windows between statement and question", ".2f")  # fmt: skip
    for at in SIZES:
        with chunk_size(subject.model, at):
            hits = answered(subject.model, text, lambda _: None)
        for row, found in by_distance(hits, windows).items():
            low, high = (float(edge) for edge in row.split("–"))
            table.add(f"chunk {at}", row, found, (low * high) ** 0.5)
        print(f"{table.title}: chunk {at} {hits.float().mean():.2f}", file=sys.stderr, flush=True)
    return table


def picture(tables: list[Table]) -> Any:
    figure = new_figure(9, 3.4 * len(tables) / 2)
    for axes, table in zip(figure.subplots(len(tables) // 2, 2, squeeze=False).flat, tables, strict=True):
        table.draw(axes)
        axes.set_ylim(-0.03, 1.03)
    return figure


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=int, nargs="+", default=[64, 8], help="chunk sizes of training")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--write", action="store_true", help="into docs")
    asked = parser.parse_args(arguments)
    subjects = {size: Subject(trained(size, asked.outputs.absolute(), asked.steps)) for size in asked.trained}
    tables = [measured(subject, size, task, asked.examples) for size, subject in subjects.items() for task in ASKED]
    text = "\n".join(table.markdown() for table in tables)
    print(text)
    if asked.write:
        content = {"steps": asked.steps, "examples": asked.examples, "tables": [table.as_json() for table in tables]}
        write_atomically(root / NUMBERS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        save(picture(tables), root / PICTURE)
        write_atomically(root / PAGE, inserted((root / PAGE).read_text(encoding="utf-8"), text, BEGIN))


if __name__ == "__main__":
    main()
