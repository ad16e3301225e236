"""What becomes of the final model when a run meets faults: python -m benchmarks.faults [--faults a,b] [--seeds 3]

Each fault is put into a short Stage 1 of the default model, through train.py in processes of its own, and its final
validation loss is compared with the clean run of the same seed. Variants: `ours`, all safeguards; `none`, the same
application without them and without clipping; `lightning`, with Lightning's SpikeDetection and gradient clipping.
A run that stopped and says that it can be resumed is, with resume=auto. Results go to the JSON file as they come, and a
second call does what is missing there. Disk full needs root, for a small tmpfs; else a limit on the size of files.

--latent FOLDER: into next-vector prediction on the vectors that `embed` wrote there, with the safeguards alone; its
linear memory has no W_init and no gate that a fault could destroy.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from atlas_lm.checkpoints.content import CheckpointError
from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.checkpoints.listing import checkpoints_in
from atlas_lm.loggers.jsonl import read_rows
from benchmarks import measuring
from benchmarks.injection import STRUCK

ROOT = Path(__file__).parents[1]
STEPS = 120
LANGUAGE = [
    # whose W_init holds something that a fault can destroy
    "+experiment=stage1", "model=tiny_deep", "data.source.tokenizer=bytes",
    f"optim.total_steps={STEPS}", "data.seq_len=512", "data.batch_size=2",
    "data.val_sequences=64", f"trainer.val_check_interval={STEPS}", "trainer.log_every_n_steps=1",
    "callbacks.progress.every_n_seconds=1000",
]  # fmt: skip
EVALUATIONS = [
    "callbacks.spike_rollback.every_n_steps=5", "callbacks.niah_probe.every_n_steps=60",
    "callbacks.memory_contribution.every_n_steps=60", "callbacks.step_checkpoint.every_n_steps=10",
    "callbacks.rank_agreement.every_n_steps=10", "callbacks.hang_watch.timeout_s=10",
]  # fmt: skip
BARE = [
    "callbacks=basic", "~callbacks.nonfinite_guard", "~callbacks.interrupt", "~callbacks.random_state",
    "~callbacks.outlier_guard", "~callbacks.hang_watch", "~callbacks.rank_agreement", "~callbacks.weight_integrity",
    "callbacks.step_checkpoint.every_n_steps=10",
]  # fmt: skip
VARIANTS = {
    "ours": EVALUATIONS,
    "none": [*BARE, "trainer.gradient_clip_val=null"],
    "lightning": [
        *BARE, "+callbacks.spikes._target_=lightning.pytorch.callbacks.spike.SpikeDetection",
        "+callbacks.spikes.finite_only=false",
    ],
}  # fmt: skip
TWO_RANKS = ["trainer.devices=2", "trainer.strategy=ddp"]
LATENT = [
    "+experiment=latent_memory", f"optim.total_steps={STEPS}", "trainer.log_every_n_steps=1",
    "callbacks.progress.every_n_seconds=1000", "callbacks.spike_rollback.every_n_steps=5",
    "callbacks.step_checkpoint.every_n_steps=10", "callbacks.rank_agreement.every_n_steps=10",
    "callbacks.hang_watch.timeout_s=10",
]  # fmt: skip
NOT_LATENT = ("empty_memory", "shut_gates")
COUNTERS = {
    "nonfinite_guard/skipped_steps": "nonfinite guard",
    "outlier_guard/outliers": "outlier guard",
    "weight_integrity/corruptions": "weight integrity",
    "spike_rollback/count": "spike rollback",
}
TIMEOUT = 900  # seconds that a run may take


@dataclass
class Fault:
    """`target`: class of benchmarks/injection.py. `scenario`: what happens beside it."""

    name: str
    what: str
    target: str | None = None
    overrides: list[str] = field(default_factory=list)
    scenario: str = "run"
    compared: bool = False  # also run without our callbacks


FAULTS = [
    Fault("clean", "nothing", "Nothing"),
    Fault("clean_two_ranks", "nothing, 2 ranks", "Nothing", TWO_RANKS),
    Fault("nan_gradient", "NaN in one rank's gradient", "NaNGradient", TWO_RANKS, compared=True),
    Fault("inf_loss", "Inf in the loss", "InfiniteLoss", compared=True),
    Fault("learning_rate", "learning rate ×100 for 20 steps", "LearningRate", compared=True),
    Fault("garbage_tokens", "20 batches of garbage tokens", "GarbageTokens", compared=True),
    Fault("bit_flip", "exponent bit of a weight flipped", "BitFlip", compared=True),
    Fault("empty_memory", "W_init of every memory zeroed", "EmptyMemory", compared=True),
    Fault("shut_gates", "gates pushed to −20", "ShutGates", compared=True),
    Fault("moments", "optimizer moments × −1000", "Moments", compared=True),
    Fault("one_rank_drifts", "one rank's weights perturbed", "OneRankDrifts", TWO_RANKS, compared=True),
    Fault("rank_stops", "a rank stops answering", "RankStops", TWO_RANKS),
    Fault("worker_killed", "data-loader worker killed", "WorkerKilled", ["data.num_workers=1"]),
    Fault("sigterm", "SIGTERM at a random step", "Terminated"),
    Fault("truncated", "SIGKILL, newest checkpoint truncated", "Killed", scenario="truncated"),
    Fault("flipped", "SIGKILL, a byte of the newest checkpoint flipped", "Killed", scenario="flipped"),
    Fault("disk_full", "disk full while saving", "Nothing", scenario="disk_full"),
    Fault("shard_flipped", "a byte of the prepared data flipped", scenario="shard_flipped"),
    Fault("kills_in_saves", "20 × SIGKILL in a checkpoint save", "Nothing", scenario="kills_in_saves"),
    Fault("kills", "20 × SIGKILL at random moments", "Nothing", scenario="kills"),
    Fault("kills_two_ranks", "20 × SIGKILL at random moments, 2 ranks", "Nothing", TWO_RANKS, scenario="kills"),
]
NAMES = {fault.name: fault for fault in FAULTS}


class Run:
    """One fault, one seed, one variant, in a folder of its own."""

    def __init__(self, fault: Fault, seed: int, variant: str, folder: Path, latent: Path | None = None) -> None:
        self.fault, self.seed, self.variant, self.folder, self.latent = fault, seed, variant, folder, latent
        self.random = random.Random(f"{fault.name} {seed}")
        self.at = self.random.randrange(STEPS // 3, STEPS * 5 // 6)
        self.outputs = folder / "outputs"
        self.errors: list[str] = []

    @property
    def run(self) -> Path:
        found = [path for path in self.outputs.glob("f/2*") if (path / "config.yaml").is_file()]
        assert len(found) == 1, f"{self.outputs} has {len(found)} runs"
        return found[0]

    def command(self, *overrides: str) -> list[str]:
        struck = f"folder={self.folder}", f"at={self.at}", f"seed={self.seed}"
        injected = [f"+callbacks.fault.{setting}" for setting in struck] if self.fault.target else []
        if self.fault.target:
            injected.append(f"+callbacks.fault._target_=benchmarks.injection.{self.fault.target}")
        vectors = [] if self.latent is None else [f"data.source.path={self.latent}"]
        experiment = [*LANGUAGE, *VARIANTS[self.variant]] if self.latent is None else [*LATENT, *vectors]
        return [
            sys.executable, str(ROOT / "train.py"), *experiment, "name=f",
            f"paths.outputs={self.outputs}", f"seed={self.seed}", f"data.seed={self.seed}", *self.fault.overrides,
            *injected, *overrides,
        ]  # fmt: skip

    def start(self, *overrides: str, limit: int | None = None) -> subprocess.Popen[bytes]:
        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                self.command(*overrides), cwd=self.folder, env={**os.environ, **threads}, start_new_session=True,
                stdout=output, stderr=subprocess.STDOUT, preexec_fn=limited,
            )  # fmt: skip

    def launch(self, *overrides: str, limit: int | None = None) -> int | str:
        """Exit code of a run to its end, or `hangs`."""
        process = self.start(*overrides, limit=limit)
        try:
            return process.wait(TIMEOUT if self.variant == "ours" else TIMEOUT // 3)
        except subprocess.TimeoutExpired:
            return "hangs"
        finally:
            kill(process)
            self.errors = [line for line in self.output().splitlines() if line.startswith("error: ")]

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def report(self) -> dict[str, Any]:
        path = self.run / "report.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def checkpoints(self) -> list[Path]:
        return [path for path in (self.run / "checkpoints").glob("*.ckpt") if not path.is_symlink()]


def kill(process: subprocess.Popen[bytes]) -> None:
    """All processes of a run, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# What was seen


def detection(run: Run, before_resume: list[dict[str, Any]]) -> tuple[str | None, int | None, str | None, int]:
    """By whom, training steps from the fault to it (1: in the very step), what was done, steps lost."""
    struck = run.folder / STRUCK
    if not struck.is_file():
        return None, None, None, 0
    batch = json.loads(struck.read_text())["batch"] - 1  # records count from 0
    before: dict[str, float] = {name: 0.0 for name in COUNTERS}
    lost, at = 0, 0
    seen: tuple[str, int] | None = None
    acts: list[str] = []
    for row in before_resume:
        step = row["global_step"]
        if step is not None:
            if step < at:
                lost += at - step + 1
            at = step
        for name, who in COUNTERS.items():
            value = row.get(name)
            if value is not None and value > before[name]:
                if row["step"] >= batch:
                    # corruption requests a rollback, which counts as a spike: the first to speak is the one that saw it
                    seen = seen or (who, row["step"] - batch + 1)
                    act = "skip" if name in ("nonfinite_guard/skipped_steps", "outlier_guard/outliers") else "rollback"
                    acts += [act] if name != "weight_integrity/corruptions" else []
                    lost += act == "skip"
                before[name] = value
    if seen is None:
        return None, None, None, lost
    counts = [f"{acts.count(act)} {act}{'s' if acts.count(act) > 1 else ''}" for act in dict.fromkeys(acts)]
    return seen[0], seen[1], ", ".join(counts), lost


def alarms(run: Run) -> int:
    """What the safeguards of a clean run complained of."""
    rows = read_rows(run.run / "metrics.jsonl")
    return int(sum(max((row.get(name) or 0 for row in rows), default=0) for name in COUNTERS))


def last_good_loads(run: Run) -> bool:
    """Whether the checkpoint that the verdict names can be read."""
    named = run.report().get("checkpoint")
    try:
        return bool(named) and "state_dict" in read_checkpoint(named)
    except CheckpointError:
        return False


# Scenarios: each returns a row


def scenario_run(run: Run) -> dict[str, Any]:
    code = run.launch()
    ended = time.time()
    rows = read_rows(run.run / "metrics.jsonl")
    by, steps, action, lost = detection(run, rows)
    found: dict[str, Any] = {
        "exit_code": code, "detected_by": by, "steps_to_detection": steps, "action": action, "steps_lost": lost,
    }  # fmt: skip
    if code != 0:
        report, struck = run.report(), run.folder / STRUCK
        note = json.loads(struck.read_text()) if struck.is_file() else None
        error = (report.get("error") or (run.errors or [""])[-1]).removeprefix("error: ")
        found |= {
            "detected_by": named(error, code, run.variant),
            "steps_to_detection": steps or (max(1, (report.get("steps") or 0) - note["step"]) if note else None),
            "action": f"{action}, stop" if action else "stop",
            "message": (run.errors or [error])[-1].removeprefix("error: ")[:400],
            "seconds_to_stop": ended - note["time"] if note else None,
            "checkpoint_loads": last_good_loads(run),
            "stopped_at": report.get("steps"),
        }
        if run.variant == "ours":
            found |= resume(run)
    return found


def named(error: str, code: int | str, variant: str) -> str | None:
    """Who stopped the run."""
    if code == "hangs":
        return None
    by = {
        "RanksDiverged": "rank agreement", "RankSilent": "hang watch", "WeightsCorrupted": "weight integrity",
        "TrainingUnstable": "spike rollback", "NonFiniteTraining": "nonfinite guard", "Preempted": "interrupt",
        "TrainingSpikeException": "SpikeDetection", "SaveError": "checkpoint", "DataLoader worker": "data loader",
        "SystemExit": "interrupt",
    }  # fmt: skip
    return next((who for word, who in by.items() if word in error), f"exit code {code}")


def resume(run: Run) -> dict[str, Any]:
    """Continue from what was saved; what that costs."""
    stopped = run.report().get("steps") or 0
    code = run.launch("resume=auto")
    began = [line for line in run.output().splitlines() if "the records continue at step" in line]
    start = int(began[-1].rsplit(" ", 1)[1]) if began else 0
    return {"resumed": code, "steps_lost": max(0, stopped - start) if began else None}


def scenario_damaged(run: Run, damage: Callable[[Path], None]) -> dict[str, Any]:
    code = run.launch()
    newest = checkpoints_in(run.run / "checkpoints")[0]
    names = newest.name, newest.resolve().name, "last.ckpt"
    damage(newest)
    at = len(read_rows(run.run / "metrics.jsonl"))
    again = run.launch("resume=auto")
    began = [line for line in run.output().splitlines() if "the records continue at step" in line]
    reported = [line for line in run.output().splitlines() if any(name in line for name in names)]
    reported = [line for line in reported if "damaged" in line or "truncated" in line]
    return {
        "exit_code": code, "resumed": again, "detected_by": "manifest" if reported else None, "steps_to_detection": 0,
        "action": "older checkpoint", "message": reported[0][:400] if reported else None,
        "steps_lost": at - int(began[-1].rsplit(" ", 1)[1]) if began else None,
    }  # fmt: skip


def scenario_truncated(run: Run) -> dict[str, Any]:
    return scenario_damaged(run, lambda path: os.truncate(path, run.random.randrange(path.stat().st_size)))


def scenario_flipped(run: Run) -> dict[str, Any]:
    return scenario_damaged(run, lambda path: flip(path, run.random))


def flip(path: Path, draw: random.Random) -> None:
    """One bit of one byte."""
    with path.open("r+b") as file:
        place = draw.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << draw.randrange(8))]))


def scenario_disk_full(run: Run) -> dict[str, Any]:
    """A disk with room for a few checkpoints only."""
    # some checkpoints of 21 or 8 MB
    room = (run.random.randrange(60, 160) if run.latent is None else run.random.randrange(10, 24)) << 20
    run.outputs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(run.outputs)], capture_output=True
    )
    is_disk = mounted.returncode == 0
    try:
        began = time.time()
        code = run.launch(limit=None if is_disk else 8 << 20)
        report = run.report()
        found = {
            "exit_code": code, "detected_by": "checkpoint" if any("cannot save" in e for e in run.errors) else None,
            "steps_to_detection": 1, "action": "stop", "message": (run.errors or [""])[-1][7:400],
            "seconds_to_stop": None, "checkpoint_loads": last_good_loads(run) or not run.checkpoints(),
            "stopped_at": report.get("steps"), "seconds": time.time() - began, "really_full": is_disk,
        }  # fmt: skip
        if is_disk:
            subprocess.run(["mount", "-o", "remount,size=1g", str(run.outputs)], check=True)
        if code != 0:
            found |= resume(run)
        return found | ending(run)
    finally:
        if is_disk:
            subprocess.run(["umount", "-l", str(run.outputs)], check=True)


def scenario_shard_flipped(run: Run) -> dict[str, Any]:
    shards = run.folder / "shards"
    if run.latent is not None:
        shutil.copytree(run.latent, shards)
        return run_on_flipped(run, run.random.choice(sorted(shards.glob("part-*.f32"))), f"data.source.path={shards}")
    prepared = subprocess.run(
        [sys.executable, "-m", "atlas_lm", "prepare", "source=stdlib", f"out={shards}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if prepared.returncode:
        raise SystemExit(prepared.stderr)
    shard = run.random.choice(sorted(path for path in shards.glob("*token*") if path.stat().st_size))
    return run_on_flipped(run, shard, "data=tokens", f"data.source.path={shards}")


def run_on_flipped(run: Run, shard: Path, *overrides: str) -> dict[str, Any]:
    """A run that reads a damaged file."""
    flip(shard, run.random)
    began = time.time()
    code = run.launch(*overrides)
    return {
        "exit_code": code, "detected_by": "shards' checksums" if run.errors and shard.name in run.errors[-1] else None,
        "steps_to_detection": 0, "action": "stop", "steps_lost": 0, "message": (run.errors or [""])[-1][7:400],
        "seconds_to_stop": time.time() - began, "checkpoint_loads": True,
    }  # fmt: skip


def scenario_kills_in_saves(run: Run) -> dict[str, Any]:
    def moment(process: subprocess.Popen[bytes]) -> None:
        """Somewhere in a save: from its first byte on."""
        saves, seen = run.random.randrange(1, 5), half_written(run)  # the last life may have left one
        while process.poll() is None:
            now = half_written(run)
            if now - seen:
                seen |= now
                saves -= 1
                if not saves:
                    time.sleep(run.random.uniform(0, 0.08))
                    return
            time.sleep(0.0005)

    return killed(run, moment)


def half_written(run: Run) -> set[tuple[str, int]]:
    """Name and inode of every checkpoint that is being written."""
    found = set()
    for path in run.outputs.glob("f/2*/checkpoints/*.ckpt.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def scenario_kills(run: Run) -> dict[str, Any]:
    def moment(process: subprocess.Popen[bytes]) -> None:
        """Anywhere from the first step of this process on; now and then before it."""
        if run.random.random() < 0.15:
            time.sleep(run.random.uniform(0, 8))
            return
        begun = "persistent memory" if run.latent is None else f"/{STEPS}  loss"  # said once by each process
        said = run.output().count(begun)
        while process.poll() is None and run.output().count(begun) == said:
            time.sleep(0.01)
        time.sleep(run.random.uniform(0, 4))

    return killed(run, moment)


def killed(run: Run, moment: Callable[[subprocess.Popen[bytes]], None]) -> dict[str, Any]:
    """20 lives, and one to the end."""
    kills, lost, unreadable, steps = 0, [], 0, 0
    while kills < 20:
        process = run.start("resume=auto")
        moment(process)
        if process.poll() is not None:
            break
        kill(process)
        kills += 1
        if not list(run.outputs.glob("f/2*/config.yaml")):
            continue
        for path in run.checkpoints():
            try:
                read_checkpoint(path)
            except CheckpointError:
                unreadable += 1
        rows = read_rows(run.run / "metrics.jsonl") if (run.run / "metrics.jsonl").exists() else []
        steps = max(steps, len(rows))
        lost.append(len(rows))
    code = run.launch("resume=auto")
    return {
        "exit_code": code, "kills": kills, "checkpoints_lost": unreadable, "detected_by": "resume=auto",
        "action": "resume", "resumed": code, "steps_to_detection": 0, "steps_lost": None,
    }  # fmt: skip


def digest(losses: list[float]) -> str:
    """Of every bit of the loss of every step."""
    return hashlib.sha256(json.dumps(losses).encode()).hexdigest()[:16]


def ending(run: Run) -> dict[str, Any]:
    """The final model, and the losses on the way to it."""
    report = run.report()
    rows = read_rows(run.run / "metrics.jsonl") if (run.run / "metrics.jsonl").exists() else []
    steps = [row["step"] for row in rows]
    return {
        "status": report.get("status"), "val_loss": report.get("val_loss"), "steps": report.get("steps"),
        "losses": digest([row["lm_loss"] for row in rows if row["lm_loss"] is not None]),
        "records_in_order": [row["seq"] for row in rows] == list(range(len(rows))) and len({*steps}) == len(steps),
        "verdict": report.get("verdict"),
    }  # fmt: skip


def measure(fault: Fault, seed: int, variant: str, keep: Path | None, latent: Path | None = None) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = Run(fault, seed, variant, folder, latent)
        began = time.time()
        found: dict[str, Any] = {"fault": fault.name, "seed": seed, "variant": variant, "at": run.at}
        found |= globals()[f"scenario_{fault.scenario}"](run)
        if fault.name.startswith("clean"):
            found["alarms"] = alarms(run)
        if fault.scenario not in ("shard_flipped", "disk_full"):
            found |= ending(run)
        found["seconds_total"] = time.time() - began
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "output", keep / f"{fault.name}-{seed}-{variant}.log")
        return found


# The table


Clean = dict[tuple[int, int], dict[str, Any]]  # by seed and number of ranks


def beside(row: dict[str, Any], clean: Clean) -> dict[str, Any] | None:
    """The clean run of the same seed and number of ranks; None where the fault left no run."""
    if row.get("status") is None:
        return None
    return clean.get((row["seed"], 2 if NAMES[row["fault"]].overrides == TWO_RANKS else 1))


def relative(row: dict[str, Any], clean: Clean) -> float | None:
    """Final validation loss over the clean run's, minus 1; infinite where it is not finite."""
    base, loss = beside(row, clean), row.get("val_loss")
    if base is None:
        return None
    return math.inf if loss is None else loss / base["val_loss"] - 1


def bitwise(row: dict[str, Any], clean: Clean) -> bool | None:
    """Whether the losses of all steps and the final one are the clean run's, in records without gap or repeat."""
    base = beside(row, clean)
    if base is None:
        return None
    same = row["losses"] == base["losses"] and row["val_loss"] == base["val_loss"]
    return same and row["records_in_order"]


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each fault and variant."""
    clean = {(row["seed"], 1): row for row in rows if row["fault"] == "clean" and row["variant"] == "ours"}
    clean |= {(row["seed"], 2): row for row in rows if row["fault"] == "clean_two_ranks"}
    found = []
    for fault in FAULTS:
        for variant in VARIANTS:
            group = [row for row in rows if row["fault"] == fault.name and row["variant"] == variant]
            if not group:
                continue
            losses = [value for row in group if (value := relative(row, clean)) is not None]
            by = [row["detected_by"] for row in group if row.get("detected_by")]
            steps = [row["steps_to_detection"] for row in group if row.get("steps_to_detection") is not None]
            lost = [row["steps_lost"] for row in group if row.get("steps_lost") is not None]
            stops = [row["seconds_to_stop"] for row in group if row.get("seconds_to_stop") is not None]
            found.append({
                "fault": fault.what, "variant": variant, "runs": len(group), "detected": len(by),
                "by": sorted({*by}), "steps": statistics.median(steps) if steps else None,
                "action": sorted({row["action"] for row in group if row.get("action")}),
                "lost": statistics.median(lost) if lost else None,
                "worst": max(losses, key=abs) if losses else None,
                "seconds": max(stops) if stops else None,
                "bitwise": all(bitwise(row, clean) for row in group),
                "unsaved": sum(row.get("checkpoints_lost", 0) for row in group)
                + sum(row.get("checkpoint_loads") is False for row in group),
                "alarms": sum(row.get("alarms", 0) for row in group),
            })  # fmt: skip
    return found


def detected(row: dict[str, Any]) -> str:
    if row["fault"].startswith("nothing"):
        return f"{row['alarms']} false alarms in {row['runs']}" if row["variant"] == "ours" else ""
    return f"{', '.join(row['by']) or 'nobody'} ({row['detected']}/{row['runs']})"


def final(row: dict[str, Any]) -> str:
    if row["worst"] is None:
        return ""
    if not math.isfinite(row["worst"]):
        return "NaN"
    return "every step bitwise" if row["bitwise"] else f"{row['worst']:+.2%}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "fault": lambda row: row["fault"],
    "safeguards": lambda row: row["variant"],
    "detected by": lambda row: detected(row),
    "steps to detection": lambda row: "" if row["steps"] is None else f"{row['steps']:g}",
    "action": lambda row: " or ".join(row["action"]),
    "steps lost": lambda row: "" if row["lost"] is None else f"{row['lost']:g}",
    "seconds to the stop": lambda row: "" if row["seconds"] is None else f"{row['seconds']:.0f}",
    "final loss, worst run against clean": lambda row: final(row),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", help="comma-separated, instead of all")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--latent", type=Path, metavar="FOLDER", help="next-vector prediction, on vectors of `embed`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clean-seeds", type=int, default=5)
    parser.add_argument("--compared-seeds", type=int, default=1, help="of the variants without our callbacks")
    parser.add_argument("--json", type=Path, help="instead of outputs/faults.json or outputs/faults_latent.json")
    parser.add_argument("--logs", type=Path, help="folder for what the runs print")
    args = parser.parse_args()
    latent = None if args.latent is None else args.latent.absolute()
    file = args.json or Path("outputs") / ("faults.json" if latent is None else "faults_latent.json")
    variants = args.variants.split(",") if latent is None else ["ours"]
    wanted = args.faults.split(",") if args.faults else [n for n in NAMES if latent is None or n not in NOT_LATENT]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        parser.error(f"there is no fault {', '.join(unknown)}; there are {', '.join(NAMES)}")
    todo = []
    for name in wanted:
        fault = NAMES[name]
        for variant in variants:
            if variant != "ours" and not (fault.compared or name == "clean"):
                continue
            seeds = args.seeds if variant == "ours" else args.compared_seeds
            seeds = 1 if name.startswith("kills") else args.clean_seeds if name == "clean" == variant else seeds
            seeds = args.clean_seeds if name == "clean" and variant == "ours" else seeds
            todo += [(fault, seed, variant) for seed in range(seeds)]
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    done = {(row["fault"], row["seed"], row["variant"]) for row in rows}
    todo = [one for one in todo if (one[0].name, one[1], one[2]) not in done]
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=len(todo))
        for fault, seed, variant in todo:
            bar.update(task, description=f"{fault.name}, seed {seed}, {variant}")
            rows.append(measure(fault, seed, variant, args.logs, latent))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=1))
            bar.advance(task)
    measuring.publish(table(rows), COLUMNS, None)


if __name__ == "__main__":
    main()
