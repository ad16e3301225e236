"""What memories are worth, runs side by side: python -m atlas_lm evaluate run=stage1,stage1_twin suite=horizon

Prints tables; writes evaluation.md, evaluation.json and a picture for each table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from atlas_lm.cli.arguments import parse
from atlas_lm.cli.figures import new_figure, save
from atlas_lm.config.names import nearest
from atlas_lm.evaluation.bootstrap import Interval, Z
from atlas_lm.evaluation.losses import Tick
from atlas_lm.evaluation.needles import needles
from atlas_lm.evaluation.subject import Subject
from atlas_lm.evaluation.suites import SUITES, Plan
from atlas_lm.evaluation.tables import Table
from atlas_lm.files import write_atomically
from atlas_lm.runs.load import load_data
from atlas_lm.training.trainer import prepare_process

ALL = {**SUITES, "needles": needles}
Suite = Callable[[Sequence[Subject], Plan, Tick], list[Table]]
HARNESS = "lm_eval"  # lm-evaluation-harness: an extra, and only where it is asked for


@dataclass
class Options:
    """Measure what the memories of trained runs are worth: intervals of 95 % by bootstrap over sequences."""

    run: str
    """Run folders or experiments, with commas between them: run=stage1,stage1_twin."""
    suite: str = "all"
    """position, horizon, state, chunks, needles, several with commas between them, or all of these; lm_eval."""
    sequences: int = 64
    """Held-out sequences, and examples of each task with needles."""
    length: int = 0
    """Tokens of a sequence; 0: the training length, or 16 windows if that is more. Above 4,096 they are streamed.
    Of RULER's tasks 4096 (0: this), 8192, … 131072."""
    block: int = 0
    """Tokens at the end whose loss is compared; 0: one attention window."""
    lengths: str = "1,2,4,8,16"
    """Haystacks of needles, times the training length."""
    chunks: str = "1,4,8,16,32,64"
    """Chunk sizes of the local memories."""
    tasks: str = "held_out"
    """Of suite=lm_eval, with commas: held_out (the run's own text), tasks of lm-evaluation-harness, paths of tasks."""
    out: str = ""
    """Folder for what is written; that of the first run if none is given."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if self.sequences < 2 or self.length < 0 or self.block < 0:
            raise ValueError(
                f"sequences={self.sequences} must be at least 2, length={self.length} and block={self.block} at least 0"
            )
        for name in self.suites:
            if name not in {*ALL, HARNESS}:
                there = [*ALL, HARNESS]
                raise ValueError(f"suite={name} is unknown{nearest(name, there)}: there are {', '.join(there)} and all")

    @property
    def suites(self) -> list[str]:
        return list(ALL) if self.suite == "all" else self.suite.split(",")


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers above 0, with commas between them. ValueError: others."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{name}={text} must be whole numbers above 0 with commas between them, such as 1,2,4")
    return tuple(map(int, text.split(",")))


def evaluate(options: Options) -> list[Table]:
    """All tables that are asked for."""
    lengths, sizes = numbers("lengths", options.lengths), numbers("chunks", options.chunks)
    subjects = [Subject(name, options.outputs) for name in dict.fromkeys(options.run.split(","))]
    window = max(s.window for s in subjects if s.has_memory) if any(s.has_memory for s in subjects) else 64
    length = options.length or max(16 * window, *(s.trained_length for s in subjects))
    block = options.block or min(window, length // 2)
    if block >= length:
        raise ValueError(f"block={block} must be smaller than the length, {length}")
    plan = Plan(options.sequences, length, block, sizes, lengths)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} tokens"),
        TimeElapsedColumn(),
    )
    tables = []
    with Progress(*columns, transient=True) as progress:
        for name in options.suites:
            bar = progress.add_task(name, total=None)
            run = harness(options) if name == HARNESS else ALL[name]
            tables += run(subjects, plan, partial(progress.advance, bar))
            progress.remove_task(bar)
    return [table for table in tables if table.cells]


def harness(options: Options) -> Suite:
    """The tasks of lm-evaluation-harness as a suite. ValueError: it is not installed."""
    try:
        from atlas_lm.exchange import harness as ours
    except ImportError as error:
        raise ValueError(f"suite={HARNESS} needs lm-evaluation-harness: pip install 'atlas-lm[lm_eval]'") from error

    def run(subjects: Sequence[Subject], plan: Plan, tick: Tick) -> list[Table]:
        tables: dict[str, Table] = {}
        for subject in subjects:
            data = load_data(subject.folder, subject.content)
            if data.tokenizer is None:
                raise ValueError(f"run={subject.name} was not trained on text: suite={HARNESS} needs one that was")
            documents = []
            if ours.OURS in options.tasks.split(","):
                raw = data.held_out_bytes() or b""
                pieces = ours.documents_of(raw, 4 * plan.length)
                spread = range(min(plan.sequences, len(pieces)))  # as other suites choose their sequences
                documents = [pieces[i * len(pieces) // len(spread)] for i in spread]
            for score in ours.evaluate(
                subject.model, data.tokenizer, options.tasks.split(","), documents, plan.sequences, tick,
                options.length,
            ):  # fmt: skip
                table = tables.setdefault(score.task, Table(f"lm_eval {score.task}", f"lm-eval: {score.task}", "", ""))
                half = math.nan if score.error is None else Z * score.error
                table.add(subject.name, score.metric, Interval(score.value, score.value - half, score.value + half))
        for table in tables.values():
            table.notes.append(
                f"- At most {plan.sequences} examples of each run; an interval only where the task gives an error."
            )
        return list(tables.values())

    return run


def write(tables: list[Table], out: Path, options: Options) -> None:
    """evaluation.md, evaluation.json, and evaluation_<table>.png for each."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out / "evaluation.md", "\n".join(["# What the memory is worth", "", *(t.markdown() for t in tables)])
    )
    content = {"options": vars(options), "tables": {table.name: table.as_json() for table in tables}}
    write_atomically(out / "evaluation.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    for table in tables:
        figure = new_figure(6, 3.6)
        table.draw(figure.subplots())
        save(figure, out / f"evaluation_{re.sub(r'[^a-z0-9]+', '_', table.name.lower())}.png")


def main(arguments: list[str]) -> None:
    """See the module. ValueError: bad arguments, or no such run."""
    options = parse(Options, arguments, "python -m atlas_lm evaluate")
    prepare_process(seed=0)
    tables = evaluate(options)
    for table in tables:
        print(table.markdown())
    out = Path(options.out) if options.out else Subject(options.run.split(",")[0], options.outputs).folder
    write(tables, out, options)
    print(f"wrote {out / 'evaluation.md'}, evaluation.json and {len(tables)} pictures")
