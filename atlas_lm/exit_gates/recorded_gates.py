"""Gates that are judged by what a run has recorded: G2-2, G2-4, G2-7, G4-1, G4-2, G4-3."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_lm.exit_gates.artifacts import RunArtifacts
from atlas_lm.exit_gates.result import GateResult
from atlas_lm.loggers.jsonl import FIELDS

Rows = Sequence[dict[str, Any]]

OVERHEAD, PROBES = 1.0, 5  # percent of the training time, probes a run
STEPS = 1000
ROLLBACKS, SPIKES = 3, 10
KAPPA, REFERENCE = 0.5, 32  # C5: the threshold at a chunk of 32 tokens
CHUNKS = range(1, 65)
WATCHED = ("train/loss", "val/loss", "optim/grad_norm", "spike_rollback/ppl", FIELDS["ppl_delta"])  # NaN in one is NaN


def last_value(rows: Rows, metric: str) -> float:
    """The value of a metric that was logged last. ValueError: never logged, or not finite."""
    found = [row for row in rows if metric in row]
    if not found:
        raise ValueError(f"the run has never logged {metric}")
    value = found[-1][metric]
    if value is None or not math.isfinite(value):
        raise ValueError(f"the last {metric} is not finite")
    return float(value)


def logged(rows: Rows, metric: str) -> tuple[int, int]:
    """How often a metric was logged: finite, not finite."""
    values = [row[metric] for row in rows if metric in row]
    finite = sum(value is not None and math.isfinite(value) for value in values)
    return finite, len(values) - finite


def probe_overhead(rows: Rows, every: int) -> GateResult:
    """G2-2: what probing every `every` steps costs, and how often it has happened."""
    probes = logged(rows, FIELDS["niah_accuracy"])[0]
    if probes < PROBES:
        remedy = f"at least {PROBES} are needed, lower callbacks.niah_probe.every_n_steps"
        return GateResult(False, None, f"{every} steps, {probes} probes: {remedy}")
    percent = last_value(rows, "niah_probe/overhead_percent")
    return GateResult(percent < OVERHEAD, percent, f"{every} steps, {percent:.2f}% overhead, {probes} probes")


def stability(report: dict[str, Any], rows: Rows, guarded: bool) -> GateResult:
    """G2-4: a run of 1000 steps that met no NaN and ended by itself. `guarded`: it had the nonfinite_guard."""
    steps, wrong = int(report.get("steps") or 0), []
    if report.get("status") != "finished":
        wrong.append(f"the run is {report.get('status')}: {report.get('error')}")
    if steps < STEPS:
        wrong.append(f"{steps} steps, {STEPS} are needed")
    if not logged(rows, "train/loss")[0]:
        wrong.append("no finite lm_loss was logged")
    for metric in WATCHED:
        bad = logged(rows, metric)[1]
        if bad:
            wrong.append(f"{metric} was not finite {bad} times")
    if not guarded:
        wrong.append("without callbacks.nonfinite_guard nobody saw the steps that were not logged")
    elif any("nonfinite_guard/skipped_steps" in row for row in rows):
        wrong.append(f"{last_value(rows, 'nonfinite_guard/skipped_steps'):.0f} steps skipped for NaN or infinity")
    return GateResult(not wrong, steps, "; ".join(wrong) or f"{steps} steps, no NaN, no OOM, 0 skipped")


def deltas_visible(rows: Rows, on_board: int) -> GateResult:
    """G2-7: the same number of perplexity deltas in metrics.jsonl and on TensorBoard."""
    finite, nonfinite = logged(rows, FIELDS["ppl_delta"])
    also = f" and {nonfinite} not finite" if nonfinite else ""
    detail = f"{finite} values{also} in metrics.jsonl, {on_board} in TensorBoard"
    return GateResult(finite > 0 and finite + nonfinite == on_board, finite, detail)


def board_values(run: Path, tag: str) -> int:
    """How many scalars of this tag the event files of a run hold. ValueError: it has no event files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TensorBoard bundles
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folders = sorted({path.parent for path in run.rglob("events.out.tfevents.*")})
        if not folders:
            raise ValueError("the run has no TensorBoard event files")
        count = 0
        for folder in folders:
            board = EventAccumulator(str(folder), {"scalars": 0, "tensors": 1})
            board.Reload()
            count += len(board.Scalars(tag)) if tag in board.Tags()["scalars"] else 0
    return count


def expected_threshold(chunk: float) -> float:
    """κ = κ_base · sqrt(32 / C_L) (C5)."""
    return KAPPA * math.sqrt(REFERENCE / chunk)


def clip_formula(clipping: Any, kappa_base: float, rows: Rows) -> GateResult:
    """G4-1: the formula is exact at every chunk size, and the run clipped at what it says, or at half of it.

    Logged values have passed through float32.
    """
    if kappa_base != KAPPA:
        return GateResult(False, kappa_base, f"kappa_base is {kappa_base}, not {KAPPA}")
    wrong = [chunk for chunk in CHUNKS if clipping.threshold(chunk) != expected_threshold(chunk)]
    if wrong:
        return GateResult(False, f"wrong at {len(wrong)} sizes", f"the formula is not met at chunk sizes {wrong}")
    both = [row for row in rows if row.get("clip_threshold") is not None and row.get("chunk_size") is not None]
    lost = sum(logged(rows, FIELDS[field])[1] for field in ("clip_threshold", "chunk_size"))
    if not both or lost:
        return GateResult(False, None, f"{len(both)} rows with a clip threshold and a chunk size, {lost} not finite")
    halved = 0
    for row in both:
        whole, found = expected_threshold(row["chunk_size"]), np.float32(row["clip_threshold"])
        if found not in (np.float32(whole), np.float32(whole / 2)):
            where = f"step {row['step']}, chunk {row['chunk_size']:g}"
            return GateResult(False, float(found), f"{where}: clipped at {found:.6g}, the formula says {whole:.6g}")
        halved += found == np.float32(whole / 2)
    sizes = len({row["chunk_size"] for row in both})
    return GateResult(True, "exact", f"exact at 1..64, and in {len(both)} rows at {sizes} chunk sizes, {halved} halved")


def few_rollbacks(rows: Rows, mode: str) -> GateResult:
    """G4-2. A run that only observes rolls nothing back, whatever happens."""
    count = int(last_value(rows, FIELDS["rollback_count"]))
    if mode != "act":
        return GateResult(False, count, f"callbacks.spike_rollback.mode={mode}: nothing would have been rolled back")
    return GateResult(
        count <= ROLLBACKS, count, f"{count} <= {ROLLBACKS}" if count <= ROLLBACKS else f"{count} rollbacks"
    )


def few_spikes(rows: Rows) -> GateResult:
    """G4-3."""
    count = int(last_value(rows, "spike_rollback/count"))
    return GateResult(count < SPIKES, count, f"{count} {'<' if count < SPIKES else '>='} {SPIKES}")


# The gates


def niah_frequency(run: RunArtifacts) -> GateResult:
    """G2-2."""
    return probe_overhead(run.rows, int(run.build("callbacks.niah_probe").every_n_steps))


def stable(run: RunArtifacts) -> GateResult:
    """G2-4."""
    return stability(run.report, run.rows, run.has("callbacks.nonfinite_guard"))


def ppl_delta(run: RunArtifacts) -> GateResult:
    """G2-7."""
    return deltas_visible(run.rows, board_values(run.run, FIELDS["ppl_delta"]))


def clipping(run: RunArtifacts) -> GateResult:
    """G4-1."""
    found = run.build("callbacks.proactive_clipping")
    return clip_formula(found, float(found.kappa_base), run.rows)


def rollbacks(run: RunArtifacts) -> GateResult:
    """G4-2."""
    return few_rollbacks(run.rows, str(run.group("callbacks.spike_rollback").get("mode", "act")))


def spikes(run: RunArtifacts) -> GateResult:
    """G4-3."""
    return few_spikes(run.rows)
