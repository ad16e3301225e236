"""The verdict on a run: `report.json`, `report.md` with the same values, and a table on the terminal.

It is written whatever becomes of the run, and says so: finished, stopped early, interrupted or failed.
"""

import gzip
import json
import logging
import lzma
import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from atlas_lm.checkpoints.listing import newest_checkpoint
from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.files import write_atomically
from atlas_lm.runs.folder import job_of
from atlas_lm.runs.stats import RunStats

log = logging.getLogger(__name__)

Report = dict[str, Any]
# Bytes of text below which the verdict compares with no compressor: of a short text their headers (18 and 60 bytes) and
# the empty window that they begin with are most of what they need, whatever the model is worth. gzip's window.
LEAST_BYTES = 32_768
WORTHLESS = 8.0  # bits per byte: what the bytes take as they are


@runtime_checkable
class HasReportValues(Protocol):
    """A module whose worth is not in bits per byte."""

    def report_values(self, found: dict[str, float]) -> dict[str, Any]:
        """What the last validation found, for the report; `quality`: the same in words, for the verdict."""
        ...


def bits_per_byte(nats_per_token: float, tokens: int, n_bytes: int) -> float:
    """Mean loss over `tokens` targets that stand for `n_bytes` of text, in bits per byte."""
    return nats_per_token * tokens / (math.log(2) * n_bytes)


def compressed_bits_per_byte(raw: bytes) -> dict[str, float]:
    """What `gzip -9` and `xz -9e` need for these bytes, headers included."""
    packed = {"gzip": gzip.compress(raw, 9, mtime=0), "xz": lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)}
    return {f"{name}_bits_per_byte": 8 * len(data) / len(raw) for name, data in packed.items()}


def judge(run: Path, trainer: Trainer, module: LightningModule, dm: TokenDataModule, stats: RunStats) -> Report:
    """Measure, write and print the report of a run that has ended, in whatever way; on rank zero."""
    report = build(run, trainer, module, dm, stats)
    if trainer.is_global_zero:
        show(report)
        try:  # last: a run that is ended by a signal before this has no verdict, and gets one when it is resumed
            write_atomically(run / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
            write_atomically(run / "report.md", markdown(report))
        except OSError as error:
            if stats.error is None:
                raise
            log.warning("the report could not be written: %s", error)  # the run's own error matters more
    return report


def build(run: Path, trainer: Trainer, module: LightningModule, dm: TokenDataModule, stats: RunStats) -> Report:
    """All values of the report; a value that is missing or no finite number is null."""
    found, checkpoint = stats.validation, newest_checkpoint(run)
    values: Report = {
        "status": status_of(stats.error, trainer.global_step, trainer.max_steps),
        "verdict": "",
        "val_loss": found.get("val/loss"),
        "val_bits_per_byte": None,
        "gzip_bits_per_byte": None,
        "xz_bits_per_byte": None,
        "tokens_per_second": stats.tokens_per_second,
        "train_seconds": stats.train_seconds,
        "tokens": stats.tokens,
        "steps": trainer.global_step,
        "total_steps": trainer.max_steps,
        "validated_at_step": stats.validated_at,
        "rollbacks": count(stats.training.get("spike_rollback/rollbacks")),
        "skipped_steps": added(stats.training, "nonfinite_guard/skipped_steps", "outlier_guard/outliers"),
        "needle_accuracy": stats.training.get("niah_probe/accuracy"),
        "needle_at_step": count(stats.training.get("niah_probe/step")),
        "context_gain": stats.training.get("memory_horizon/gain"),
        "context_gain_low": stats.training.get("memory_horizon/gain_low"),
        "context_gain_high": stats.training.get("memory_horizon/gain_high"),
        "memory_horizon": count(stats.training.get("memory_horizon/horizon")),
        "memory_horizon_at_step": count(stats.training.get("memory_horizon/step")),
        "memory_contribution": stats.training.get("memory_contribution/perplexity_rise"),
        "memory_contribution_at_step": count(stats.training.get("memory_contribution/step")),
        "parameters": sum(p.numel() for p in module.parameters()),
        "precision": str(trainer.precision),
        "checkpoint": str(checkpoint) if checkpoint else None,
        "run": str(run),
        "error": describe(stats.error),
    }
    if stats.validated_at is not None:
        values.update(held_out_text(dm, values["val_loss"]))
        if "recall/accuracy" in found:
            values["recall_accuracy"] = found["recall/accuracy"]
            values["recall_chance"] = getattr(dm.source, "chance", None)
        if isinstance(module, HasReportValues):
            values.update(module.report_values({**stats.training, **found}))
    values = {name: finite(value) for name, value in values.items()}
    values["verdict"] = verdict(values)
    return values


def count(value: float | None) -> int | None:
    """A counter that was logged; None where it was not."""
    return None if value is None or not math.isfinite(value) else int(value)


def added(logged: dict[str, float], *names: str) -> int | None:
    """The sum of counters; None where none of them was logged."""
    counts = [found for name in names if (found := count(logged.get(name))) is not None]
    return sum(counts) if counts else None


def held_out_text(dm: TokenDataModule, val_loss: float | None) -> dict[str, float | None]:
    """Bits per byte of the model, gzip and xz on the very bytes that validation scored; {} where there is no text."""
    raw = dm.held_out_bytes()
    if not raw or val_loss is None:
        return {}
    return {
        "val_bits_per_byte": bits_per_byte(val_loss, dm.validation_tokens, len(raw)),
        "val_bytes": len(raw),
        "lost_characters": dm.lost_characters(),
        "lost_characters_train": dm.lost_characters("train"),
        **compressed_bits_per_byte(raw),
    }


def status_of(error: BaseException | None, steps: int, total: int) -> str:
    """finished | stopped early | interrupted | failed"""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "interrupted"
    if error is not None:
        return "failed"
    return "finished" if steps >= total else "stopped early"


def describe(error: BaseException | None) -> str | None:
    """An exception on one line."""
    return None if error is None else " ".join(f"{type(error).__name__}: {error}".split())


def finite(value: Any) -> Any:
    """None in place of NaN and infinity, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(report: Report) -> str:
    """One honest sentence."""
    status, steps, total = report["status"], report["steps"], report["total_steps"]
    if status == "failed":
        return f"FAILED at step {steps} of {total}: {report['error']}"
    head = status if status == "finished" else f"{status} at step {steps} of {total}"
    if report["validated_at_step"] is None:
        return f"{head}, never validated"
    if report["val_loss"] is None:
        return f"{head}, but the validation loss is not finite: the model is useless"
    late = "" if report["validated_at_step"] == steps else f" (validated at step {report['validated_at_step']})"
    return f"{head}: {quality(report)}{late}{mishaps(report)}{unused(report)}"


def unused(report: Report) -> str:
    """That the memory was found to give nothing from beyond attention's reach; nothing where it was not measured."""
    gain, low = report.get("context_gain"), report.get("context_gain_low")
    if gain is None or low is None or low > 0:
        return ""
    return f"; its memory is NOT used beyond attention's reach (context gain {gain:+.4f} nats per token)"


def mishaps(report: Report) -> str:
    """What the safeguards have mended on the way; nothing on a healthy run."""
    found = [(report.get("rollbacks"), "rollback"), (report.get("skipped_steps"), "skipped step")]
    reported = [f"{n} {what}{'s' if n > 1 else ''}" for n, what in found if n]
    return f"; {' and '.join(reported)} on the way" if reported else ""


def quality(report: Report) -> str:
    """How good the model is, against what it has to beat."""
    if report.get("quality"):
        return str(report["quality"])
    bits, gzip_bits, xz_bits = (report[f"{name}_bits_per_byte"] for name in ("val", "gzip", "xz"))
    if bits is not None:
        size = report.get("val_bytes", LEAST_BYTES)
        against = ", ".join(
            f"{abs(bits / other - 1):.1%} {'below' if bits < other else 'ABOVE'} {name} ({other:.3f})"
            for name, other in (("gzip -9", gzip_bits), ("xz -9e", xz_bits))
        )
        lost = report.get("lost_characters") or 0.0
        without = f" without the {lost:.2%} of its characters that the tokenizer loses" if lost else ""
        if bits >= WORTHLESS:
            against = f"no fewer than the {WORTHLESS:g} that a byte has: the model is useless"
        elif size < LEAST_BYTES:
            against = f"{size} bytes are too few to compare with gzip and xz, which need {LEAST_BYTES} to get going"
        return f"{bits:.3f} bits per byte on held-out text{without}, {against}"
    accuracy, chance = report.get("recall_accuracy"), report.get("recall_chance")
    if accuracy is not None:
        return f"recall {accuracy:.3f}" + (f", chance {chance:.3f}" if chance is not None else "")
    return f"validation loss {report['val_loss']:.4f}"


def shown(value: Any) -> str:
    """A value as the tables show it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(report: Report) -> str:
    """`report.md`."""
    shows = {name: value for name, value in report.items() if name not in ("verdict", "quality")}
    rows = "\n".join(f"| {name} | {shown(value)} |" for name, value in shows.items())
    return (
        f"# {report['verdict']}\n\n| | |\n|---|---|\n{rows}\n\n"
        "Beside this file: `report.json` the same values, `config.yaml` the resolved configuration, `environment.json` "
        "git state and package versions, `metrics.jsonl` and `tensorboard/` all metrics, `checkpoints/`, `train.log`.\n"
    )


def show(report: Report) -> None:
    """Print the table, then the paths and the verdict on lines of their own, where nothing cuts them."""
    table = Table(show_header=False, title=f"{report['status']}", title_justify="left")
    paths = ("run", "checkpoint")
    for name, value in report.items():
        if value is not None and name not in ("status", "verdict", "quality", "error", *paths):
            table.add_row(name, shown(value))
    console = Console()
    console.print(table)
    for name in paths:
        console.print(f"{name}: {report[name]}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"verdict: {report['verdict']}", soft_wrap=True, markup=False, highlight=False)
    hint = how_to_continue(report, job_of(Path(report["run"])))
    if hint:
        console.print(hint, soft_wrap=True, markup=False, highlight=False)


def how_to_continue(report: Report, job: str | None) -> str | None:
    """What the user does with an unfinished run; None where there is nothing to do or to continue from, or where its
    error says from what. `job`: the scheduler's job that trains it."""
    if report["status"] in ("finished", "stopped early") or not report["checkpoint"]:
        return None
    if report["status"] == "failed" and "resume" in (report["error"] or ""):
        return None
    if job is not None:
        return (
            f"if job {job} is started again, it continues by itself; if it is not, the same command with "
            f"resume={report['run']}"
        )
    return f"run the same command with resume=auto, or resume={report['checkpoint']}"
