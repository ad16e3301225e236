"""Is the memory worth its time? Ours and its twins at equal steps and at equal time: python -m benchmarks.worth

First the speeds: whole training steps of all models, taken in turn in one process, so that a busier minute meets all;
this part wants a quiet machine. For each model a learning rate is chosen by the same small sweep over the whole of the
equal time (shorter runs prefer rates that are too high for it: --sweep), extended in either direction until the loss
rises again, so that no model is held back by where the sweep ends. Then it trains for as many steps as the
experiment has, and for as many as fill the time of the first model; `--seeds` times. One table, one
picture (validation loss against seconds at those speeds). What has finished is not made again, so an interrupted
benchmark is continued by the same command.

--quick: one seed and a tenth of the steps, for screening. --models and --set choose and change what is trained.
--add: the first model only sets the time, and the rows that --write finds in docs stay beside the new ones.
--jobs: so many trainings at once, each with its share of the cores; steps are counted, so results stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as nnf

import atlas_lm.config.schema
import atlas_lm.runs.resolve  # noqa: F401  # both register what conf/ needs
from atlas_lm.cli.figures import new_figure, save
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.training.optimizer import build_optimizer
from atlas_lm.training.trainer import resolve_precision
from benchmarks import measuring
from benchmarks.figures import inserted

MODULE = "benchmarks.worth"
SPEED_STEPS = 15
NUMBERS, PAGE, PICTURE = "docs/results/worth.json", "docs/results/worth.md", "docs/worth.png"
BEGIN = "<!-- worth: python -m benchmarks.worth --write -->"
RATES = (1.0, 2.0)  # times the experiment's learning rates: where a sweep begins
LOWEST, HIGHEST = 1 / 16, 16.0  # and where it ends at the latest
SWEEP_SEQUENCES = 64  # of validation, to choose a rate by in less than the whole time
UNSTABLE = (
    "NonFiniteTraining",
    "LossOutliers",
    "TrainingUnstable",
    "GateFailure",
)  # safeguards' words for too high a rate
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 %, by number of seeds


class Model(NamedTuple):
    """What is trained: settings on top of the experiment's. `windows`: attention's, of the experiment's; 0: all."""

    settings: tuple[str, ...] = ()
    windows: int = 1


BLIND = ("model.memory=none", "callbacks=basic")
MODELS = {
    "memory": Model(),
    "gated delta net": Model(("model.memory=gated_delta", "callbacks=basic")),
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
    jobs: int = 1  # trainings at once
    data: tuple[str, ...] = ()  # settings that keep the data what they are when the window is another one
    sweep: float = 1.0  # below 1: each rate is tried for this share of the experiment's steps, not for the equal time


COMPOSING = threading.Lock()  # Hydra's state is one for the process


def composed(experiment: str, extra: Sequence[str]) -> Any:
    """The configuration of a run; from any thread."""
    with COMPOSING, initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return compose("train", overrides=[f"+experiment={experiment}", *extra])


def meaning(experiment: str, extra: Sequence[str]) -> str:
    """A digest of what is trained: model, data, optimizer and precision, as composed."""
    cfg = composed(experiment, extra)
    parts = [OmegaConf.to_container(cfg[name], resolve=False) for name in ("model", "data", "optim")]
    return hashlib.sha256(json.dumps([*parts, cfg.precision], sort_keys=True).encode()).hexdigest()[:16]


def setting(experiment: str, extra: list[str], quick: bool, out: Path, jobs: int = 1, sweep: float = 1.0) -> Setting:
    """From the experiment's composed configuration."""
    cfg = composed(experiment, extra)
    steps = max(20, cfg.optim.total_steps // 10) if quick else cfg.optim.total_steps
    rates = {name: float(cfg.optim[name]) for name in ("lr", "muon_lr", "memory_lr") if cfg.optim.get(name) is not None}
    length = int(cfg.data.seq_len)
    tokens = length * int(cfg.data.batch_size) * int(cfg.trainer.get("accumulate_grad_batches") or 1)
    window = int(cfg.model.window)
    data = (f"data.source.window={window}",) if OmegaConf.select(cfg, "data.source.window") is not None else ()
    return Setting(experiment, extra, steps, window, length, tokens, rates, out, jobs, data, sweep)


def settings_of(s: Setting, name: str) -> list[str]:
    """What makes the experiment this model."""
    model = MODELS[name]
    window = s.length if model.windows == 0 else min(s.length, model.windows * s.window)
    return [*model.settings, f"model.window={window}", *s.data, *s.extra]


def step_of(s: Setting, name: str) -> Callable[[], None]:
    """One training step of random tokens: forward, backward, clipping and the optimizer."""
    cfg = composed(s.experiment, settings_of(s, name))
    model_config, optim_config = (OmegaConf.to_object(part) for part in (cfg.model, cfg.optim))
    rows, device = int(cfg.data.batch_size), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vocabulary = instantiate(cfg.data).vocab_size
    model = AtlasLM(model_config, vocabulary).to(device)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, optim_config)  # type: ignore[arg-type]
    tokens = torch.randint(vocabulary, (rows, s.length + 1), device=device)
    low = resolve_precision(cfg.precision, str(cfg.trainer.accelerator)) == "bf16-mixed"

    def step() -> None:
        for _ in range(s.tokens // (rows * s.length)):
            with torch.autocast(device, torch.bfloat16, enabled=low):
                logits = model(tokens[:, :-1]).logits
            nnf.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        measuring.wait(device)

    return step


def speeds(s: Setting, names: list[str]) -> dict[str, float]:
    """Tokens per second of each model; measured once."""
    path = s.out / "speeds.json"
    key = {name: [*settings_of(s, name), meaning(s.experiment, settings_of(s, name))] for name in names}
    known = json.loads(path.read_text()) if path.is_file() else {}
    if any(known.get("models", {}).get(name) != settings for name, settings in key.items()):
        print("speeds", file=sys.stderr, flush=True)
        found = measuring.in_process(MODULE, {"setting": [*s[:7], str(s.out)], "names": names})
        known = {"models": key, "tokens_per_second": found}
        write_atomically(path, json.dumps(known, indent=1))
    return {name: known["tokens_per_second"][name] for name in names}


def worker(request: str) -> None:
    asked = json.loads(request)
    s = Setting(*asked["setting"])
    found = measuring.medians({name: step_of(s, name) for name in asked["names"]}, SPEED_STEPS, warm=3)
    print(json.dumps({name: s.tokens / median for name, median in found.items()}))


def slug(text: str) -> str:
    """A name of a folder."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower())


def train(
    s: Setting, name: str, steps: int, rate: float, seed: int, what: str, may_fail: bool = False
) -> dict[str, Any]:
    """The report of a run; it is made unless it has finished before.

    `may_fail`: a safeguard may end it, for too high a rate. RuntimeError: it did not finish.
    """
    label = slug(f"{what} {name} x{rate} seed {seed} steps {steps}")
    every = max(1, steps // (1 if what == "sweep" else 4))  # a validation is as long as a hundred steps
    command = [
        f"+experiment={s.experiment}", *settings_of(s, name), f"name={label}", f"seed={seed}", f"data.seed={seed}",
        f"optim.total_steps={steps}", f"trainer.val_check_interval={every}", f"paths.outputs={s.out / 'runs'}",
        *(f"optim.{key}={value * rate:g}" for key, value in s.rates.items()),
        *([f"data.val_sequences={SWEEP_SEQUENCES}"] if what == "sweep" else []),
    ]  # fmt: skip
    report = s.out / "runs" / label / "latest" / "report.json"
    known = s.out / "runs" / f"{label}.json"
    # a command alone does not say what the files of conf/ make of it
    wanted = {"command": command, "settings": meaning(s.experiment, command[1:])}
    same = known.is_file() and json.loads(known.read_text()) == wanted
    if not (same and settled(report, may_fail)):
        print(f"{label}", file=sys.stderr, flush=True)
        write_atomically(known, json.dumps(wanted))
        resume = ["resume=auto"] if same else []
        whole = [sys.executable, str(ROOT / "train.py"), *command, *resume]
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // s.jobs))} if s.jobs > 1 else {}
        done = subprocess.run(whole, capture_output=True, text=True, env=os.environ | share)
        if done.returncode and not settled(report, may_fail):
            raise RuntimeError(f"{label} did not finish:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(report.read_text())


def settled(path: Path, may_fail: bool) -> bool:
    """Whether a run needs no more training: it finished, or its rate was so high that a safeguard ended it."""
    report = json.loads(path.read_text()) if path.is_file() else {"status": "missing"}
    unstable = report["status"] == "failed" and str(report["error"]).startswith(UNSTABLE)
    return report["status"] == "finished" or (may_fail and unstable)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the interval of 95 % over seeds; infinite for one seed."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, STUDENT.get(n, 2.0) * deviation / math.sqrt(n)


def best_rates(s: Setting, steps: dict[str, int], pool: Executor) -> dict[str, dict[float, float]]:
    """By model: the loss that each rate reaches in the sweep, the best first; infinite where training is unstable.

    `steps`: of each model at equal time. Over the whole of it the sweep's run is the first seed's.
    """
    short = max(10, round(s.sweep * s.steps))

    def loss(name: str, rate: float) -> float:
        length, what = (steps[name], "run") if s.sweep >= 1 else (short, "sweep")
        report = train(s, name, length, rate, 0, what, may_fail=True)
        return report["val_loss"] if report["status"] == "finished" and report["val_loss"] is not None else math.inf

    def sweep(name: str) -> dict[float, float]:
        found = {rate: loss(name, rate) for rate in RATES}
        while (rate := next_rate(found)) is not None:
            found[rate] = loss(name, rate)
        return {rate: found[rate] for rate in sorted(found, key=lambda rate: found[rate])}

    return dict(zip(steps, pool.map(sweep, steps), strict=True))


def next_rate(found: dict[float, float]) -> float | None:
    """The rate beyond the best one where that is at an end of those tried; None where it is not, or at the limits."""
    best = min(found, key=lambda rate: found[rate])
    beyond = 2 * best if best == max(found) else best / 2 if best == min(found) else best
    return None if beyond in found or not LOWEST <= beyond <= HIGHEST else beyond


def measure(
    s: Setting, names: list[str], seeds: int, add: bool = False, steps_seeds: int | None = None
) -> dict[str, Any]:
    """All runs; by model its speed, its rate and the reports at equal steps and at equal time.

    `add`: the first model sets the time and is not trained. `steps_seeds`: how many seeds train at equal steps too.
    """
    with_steps = range(seeds if steps_seeds is None else steps_seeds)
    speed = speeds(s, names)
    first, names = names[0], names[1:] if add else names
    as_long = {name: max(1, round(s.steps * speed[name] / speed[first])) for name in names}
    with ThreadPoolExecutor(s.jobs) as pool:
        sweeps = best_rates(s, as_long, pool)
        rates = {name: next(iter(sweep)) for name, sweep in sweeps.items()}
        runs = [(name, as_long[name], seed) for seed in range(seeds) for name in names]
        runs += [(name, s.steps, seed) for seed in with_steps for name in names if as_long[name] != s.steps]
        reports = pool.map(lambda x: train(s, x[0], x[1], rates[x[0]], x[2], "run"), runs)
        made = dict(zip(runs, reports, strict=True))
    return {
        name: {
            "tokens_per_second": speed[name],
            "rate": rates[name],
            "sweep": {str(rate): loss if math.isfinite(loss) else None for rate, loss in sweeps[name].items()},
            "steps": [made[name, s.steps, seed] for seed in with_steps],
            "time": [made[name, as_long[name], seed] for seed in range(seeds)],
        }
        for name in names
    }


def figure_of(report: dict[str, Any]) -> float:
    """Bits per byte; the loss where the tokens are no text."""
    return float(report["val_loss"] if report["val_bits_per_byte"] is None else report["val_bits_per_byte"])


class Row(NamedTuple):
    """What is published of a model. Figures: mean over seeds and half the interval of 95 %, null for one seed."""

    model: str
    equal_time: tuple[float, float | None]
    equal_steps: tuple[float, float | None]
    steps: int  # at equal time
    seconds: float  # of training
    tokens_per_second: float
    parameters: int
    rate: float  # times the experiment's learning rates


def summary(found: dict[str, Any]) -> list[Row]:
    """One row a model."""

    def figure(reports: list[dict[str, Any]]) -> tuple[float, float | None]:
        mean, half = interval([figure_of(report) for report in reports])
        return mean, half if math.isfinite(half) else None

    rows = []
    for name, runs in found.items():
        time, steps, speed = runs["time"], runs["steps"], runs["tokens_per_second"]
        rows.append(
            Row(name, figure(time), figure(steps), time[0]["steps"], time[0]["tokens"] / speed, speed,
                steps[0]["parameters"], runs["rate"])
        )  # fmt: skip
    return rows


def shown(figure: Sequence[float | None]) -> str:
    """A mean with half its interval."""
    mean, half = figure
    return f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}")


def table(rows: list[Row]) -> str:
    """Markdown; equal time first."""
    lines = [
        "| model | equal time: bits per byte | steps | seconds | equal steps: bits per byte | tokens/s | parameters | "
        "learning rates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.model} | **{shown(r.equal_time)}** | {r.steps:,} | {r.seconds:,.0f} | {shown(r.equal_steps)} | "
            f"{r.tokens_per_second:,.0f} | {r.parameters:,} | × {r.rate:g} |"
        )
    return "\n".join(lines)


def publish(found: dict[str, Any], s: Setting, how: str, root: Path = ROOT, *, add: bool = False) -> None:
    """Into docs: the table, its numbers, the picture. `benchmarks.figures` takes the README's rows from there.

    `add`: beside the rows that are there, whose picture stays.
    """
    rows = summary(found)
    command = f"python -m benchmarks.worth {how}" + (f" --set {' '.join(s.extra)}" if s.extra else "")
    seeds = len(next(iter(found.values()))["time"])
    if add:
        known = json.loads((root / NUMBERS).read_text(encoding="utf-8"))
        first = known["models"][0]
        if (
            known["experiment"] != s.experiment
            or first["steps"] != s.steps
            or ("--set" in known["command"]) != bool(s.extra)
        ):
            raise SystemExit(
                f"the rows of {NUMBERS} are of other settings ({known['command']}): measure all models again"
            )
        rows = beside(known["models"], rows)
        command = "; ".join(dict.fromkeys([known["command"], command]))
        seeds = known["seeds"]  # of the rows that were there; the command says how many the new ones have
    content = {
        "command": command,
        "experiment": s.experiment,
        "seeds": seeds,
        "models": [row._asdict() for row in rows],
    }
    write_atomically(root / NUMBERS, json.dumps(content, indent=1) + "\n")
    page = (root / PAGE).read_text(encoding="utf-8")
    write_atomically(root / PAGE, inserted(page, f"`{command}`\n\n{table(rows)}", BEGIN))
    if not add:
        draw(found, root / PICTURE)


def beside(known: list[dict[str, Any]], new: list[Row]) -> list[Row]:
    """Published rows and new ones, in the order of MODELS; a new one takes the place of its old one."""
    rows = {row["model"]: Row(**row) for row in known} | {row.model: row for row in new}
    return sorted(rows.values(), key=lambda row: list(MODELS).index(row.model))


def curve(report: dict[str, Any], tokens_per_second: float) -> tuple[list[float], list[float]]:
    """Seconds of training, and validation loss."""
    rows = read_rows(Path(report["run"]) / "metrics.jsonl")
    points = [(row["step"] + 1, row["val/loss"]) for row in rows if row.get("val/loss") is not None]
    per_step = report["tokens"] / report["steps"] / tokens_per_second
    return [step * per_step for step, _ in points], [loss for _, loss in points]


def draw(found: dict[str, Any], path: Path) -> None:
    """Validation loss against seconds, at equal time."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for n, (name, runs) in enumerate(found.items()):
        for i, report in enumerate(runs["time"]):
            points = curve(report, runs["tokens_per_second"])
            axes.plot(*points, color=f"C{n}", marker="o", markersize=3, label=name if i == 0 else None)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per token", title="Equal training time")
    axes.legend(fontsize=8)
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="stage1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps-seeds", type=int, help="seeds that train at equal steps too; all if not given")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="the first sets the time"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/worth"))
    parser.add_argument("--sweep", type=float, default=1.0, help="share of the experiment's steps to try a rate for")
    parser.add_argument(
        "--set", nargs="*", default=[], dest="extra", help="settings of all runs, as train.py takes them"
    )
    parser.add_argument("--write", action="store_true", help="into docs/results")
    parser.add_argument("--add", action="store_true", help="do not train the first model; keep the rows in docs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return worker(options.worker)
    if options.steps_seeds is not None and not 1 <= options.steps_seeds <= options.seeds:
        parser.error(f"--steps-seeds {options.steps_seeds} must lie in 1 to --seeds, {options.seeds}")
    s = setting(options.experiment, options.extra, options.quick, options.out.absolute(), options.jobs, options.sweep)
    (s.out / "runs").mkdir(parents=True, exist_ok=True)
    found = measure(s, options.models, 1 if options.quick else options.seeds, options.add, options.steps_seeds)
    text = table(summary(found))
    print(text)
    write_atomically(s.out / "worth.md", f"{text}\n")
    write_atomically(s.out / "worth.json", json.dumps(found, indent=1) + "\n")
    draw(found, s.out / "worth.png")
    if options.write:
        shorter = f" --sweep {options.sweep:g}" if options.sweep < 1 else ""
        fewer = f" --steps-seeds {options.steps_seeds}" if options.steps_seeds is not None else ""
        models = " --add --models " + " ".join(f"'{name}'" for name in options.models) if options.add else ""
        how = ("--quick" if options.quick else f"--seeds {options.seeds}") + shorter + fewer + models
        publish(found, s, how, add=options.add)


if __name__ == "__main__":
    main()
