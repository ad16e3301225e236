"""Is the memory worth its time? Ours and its twins at equal steps and at equal time: python -m benchmarks.worth

For each model a learning rate is chosen by the same small sweep. Then it trains for as many steps as the experiment
has, and for as long as the memory model took; `--seeds` times. One table, one picture (validation loss against
seconds). Runs that have finished are not made again, so an interrupted benchmark is continued by the same command.

--quick: one seed and a tenth of the steps, for screening. --models and --set choose and change what is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir

import atlas_lm.config.schema
import atlas_lm.runs.resolve  # noqa: F401  # both register what conf/ needs
from atlas_lm.cli.figures import new_figure, save
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.loggers.jsonl import read_rows

RATES = (0.5, 1.0, 2.0)  # times the experiment's learning rates
SWEEP = 0.25  # of the steps, for each rate
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 %, by number of seeds


class Model(NamedTuple):
    """What is trained: settings on top of the experiment's. `windows`: attention's, of the experiment's; 0: all."""

    settings: tuple[str, ...] = ()
    windows: int = 1


BLIND = ("model.memory=none", "callbacks=basic")
MODELS = {
    "memory": Model(),
    "no memory": Model(BLIND),
    "no memory, 2 windows": Model(BLIND, 2),
    "no memory, 4 windows": Model(BLIND, 4),
    "full attention": Model(BLIND, 0),
}


class Setting(NamedTuple):
    """The benchmark's own."""

    experiment: str
    extra: list[str]
    steps: int
    window: int
    length: int
    tokens: int  # of a step
    rates: dict[str, float]  # optim.<name> → learning rate
    out: Path


def setting(experiment: str, extra: list[str], quick: bool, out: Path) -> Setting:
    """From the experiment's composed configuration."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", overrides=[f"+experiment={experiment}", *extra])
    steps = max(20, cfg.optim.total_steps // 10) if quick else cfg.optim.total_steps
    rates = {name: float(cfg.optim[name]) for name in ("lr", "muon_lr", "memory_lr") if cfg.optim.get(name) is not None}
    length = int(cfg.data.seq_len)
    tokens = length * int(cfg.data.batch_size) * int(cfg.trainer.get("accumulate_grad_batches") or 1)
    return Setting(experiment, extra, steps, int(cfg.model.window), length, tokens, rates, out)


def train(s: Setting, name: str, steps: int, rate: float, seed: int, what: str) -> dict[str, Any]:
    """The report of a run; it is made unless it has finished before. RuntimeError: it did not finish."""
    model = MODELS[name]
    window = s.length if model.windows == 0 else min(s.length, model.windows * s.window)
    label = re.sub(r"[^a-z0-9]+", "_", f"{what} {name} x{rate} seed {seed} steps {steps}".lower())
    every = max(1, steps // 10)
    command = [
        f"+experiment={s.experiment}", *model.settings, f"model.window={window}", f"name={label}", f"seed={seed}",
        f"data.seed={seed}", f"optim.total_steps={steps}", f"trainer.val_check_interval={every}",
        f"paths.outputs={s.out / 'runs'}", *(f"optim.{key}={value * rate:g}" for key, value in s.rates.items()),
        *s.extra,
    ]  # fmt: skip
    report = s.out / "runs" / label / "latest" / "report.json"
    known = s.out / "runs" / f"{label}.json"
    same = known.is_file() and json.loads(known.read_text()) == command
    if not (same and report.is_file() and json.loads(report.read_text())["status"] == "finished"):
        print(f"{label}", file=sys.stderr, flush=True)
        write_atomically(known, json.dumps(command))
        resume = ["resume=auto"] if same else []
        whole = [sys.executable, str(ROOT / "train.py"), *command, *resume]
        done = subprocess.run(whole, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{label} did not finish:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(report.read_text())


def seconds(report: dict[str, Any]) -> float:
    """Of training, validations left out: these cost all models alike and are no part of a comparison."""
    return report["tokens"] / report["tokens_per_second"]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the interval of 95 % over seeds; infinite for one seed."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, STUDENT.get(n, 2.0) * deviation / math.sqrt(n)


def measure(s: Setting, names: list[str], seeds: int) -> dict[str, Any]:
    """All runs; by model its rate and the reports at equal steps and at equal time."""
    found: dict[str, Any] = {}
    for name in names:
        short = max(10, round(SWEEP * s.steps))
        sweep = {rate: train(s, name, short, rate, 0, "sweep")["val_loss"] for rate in RATES}
        rate = min(sweep, key=lambda rate: math.inf if sweep[rate] is None else sweep[rate])
        found[name] = {"rate": rate, "sweep": {str(k): v for k, v in sweep.items()}, "steps": [], "time": []}
    for seed in range(seeds):
        for name in names:
            found[name]["steps"].append(train(s, name, s.steps, found[name]["rate"], seed, "steps"))
        budget = seconds(found[names[0]]["steps"][seed])
        for name in names:
            same = found[name]["steps"][seed]
            steps = s.steps if name == names[0] else max(1, round(budget * same["tokens_per_second"] / s.tokens))
            found[name]["time"].append(
                same if name == names[0] else train(s, name, steps, found[name]["rate"], seed, "time")
            )
    return found


def figure_of(report: dict[str, Any]) -> float:
    """Bits per byte; the loss where the tokens are no text."""
    return float(report["val_loss"] if report["val_bits_per_byte"] is None else report["val_bits_per_byte"])


def table(found: dict[str, Any]) -> str:
    """Markdown; equal time first."""

    def shown(reports: list[dict[str, Any]]) -> str:
        mean, half = interval([figure_of(report) for report in reports])
        return f"{mean:.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")

    lines = [
        "| model | equal time: bits per byte | steps | seconds | equal steps: bits per byte | tokens/s | parameters | "
        "learning rates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        time, steps = runs["time"], runs["steps"]
        lines.append(
            f"| {name} | **{shown(time)}** | {sum(r['steps'] for r in time) / len(time):,.0f} | "
            f"{sum(map(seconds, time)) / len(time):,.0f} | {shown(steps)} | "
            f"{sum(r['tokens_per_second'] for r in steps) / len(steps):,.0f} | {steps[0]['parameters']:,} | "
            f"× {runs['rate']:g} |"
        )
    return "\n".join(lines)


def curve(report: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds since the first record, and validation loss."""
    rows = read_rows(Path(report["run"]) / "metrics.jsonl")
    points = [(row["time"] - rows[0]["time"], row["val/loss"]) for row in rows if row.get("val/loss") is not None]
    return [x for x, _ in points], [y for _, y in points]


def draw(found: dict[str, Any], path: Path) -> None:
    """Validation loss against seconds, at equal time."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for n, (name, runs) in enumerate(found.items()):
        for i, report in enumerate(runs["time"]):
            axes.plot(*curve(report), color=f"C{n}", marker="o", markersize=3, label=name if i == 0 else None)
    axes.set(xlabel="seconds", ylabel="validation loss, nats per token", title="Equal training time")
    axes.legend(fontsize=8)
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="stage1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="the first sets the time"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/worth"))
    parser.add_argument(
        "--set", nargs="*", default=[], dest="extra", help="settings of all runs, as train.py takes them"
    )
    options = parser.parse_args(arguments)
    s = setting(options.experiment, options.extra, options.quick, options.out.absolute())
    (s.out / "runs").mkdir(parents=True, exist_ok=True)
    found = measure(s, options.models, 1 if options.quick else options.seeds)
    text = table(found)
    print(text)
    write_atomically(s.out / "worth.md", f"{text}\n")
    write_atomically(s.out / "worth.json", json.dumps(found, indent=1) + "\n")
    draw(found, s.out / "worth.png")


if __name__ == "__main__":
    main()
