"""Show how far training is: step, chosen metrics, time left.

Watches:  the metrics that were logged under the given names.
Acts:     a Rich progress bar over all steps of the run; plain lines where the output is no terminal.
Logs:     nothing.
Requires: any LightningModule.
"""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from callbacks.support.ranges import at_least, check


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`; `?` where the time is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def compact(value: float) -> str:
    """Four significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class TrainingProgress(RichProgressBar):
    """A bar over the optimizer steps of the whole run, with `metrics`: shown name → logged name.

    Without a terminal (a file, a pipe, CI) it prints a line every `every_n_seconds`. ValueError if that is negative.
    """

    def __init__(self, metrics: dict[str, str], every_n_seconds: float = 10, refresh_rate: int = 4) -> None:
        check("progress", every_n_seconds=(every_n_seconds, at_least(0)))
        super().__init__(refresh_rate=refresh_rate, leave=True)
        self.metrics = dict(metrics)
        self.every_n_seconds = every_n_seconds
        self.plain = False
        self._started = self._shown = 0.0
        self._first_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bar and lines."""
        super().setup(trainer, pl_module, stage)
        console = Console()
        self.plain = not (console.is_terminal or console.is_jupyter)
        if self.plain:
            self.disable()

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps of the run, where they are known: one bar, not one per epoch."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._started, self._shown = time.monotonic(), -math.inf  # the first line comes with the first step
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line if it is time; both read the metrics only as often as they show them."""
        now, last = time.monotonic(), trainer.global_step == trainer.max_steps
        if self.plain:
            if trainer.is_global_zero and (now - self._shown >= self.every_n_seconds or last):
                self._shown = now
                print(self.line(trainer, now), flush=True)
            return
        if self.is_disabled or (now - self._shown < 1 / self.refresh_rate and not last):
            return
        self._shown = now
        steps = trainer.global_step if trainer.max_steps > 0 else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, steps - 1 if trainer.max_steps > 0 else steps)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what validation found, where there is no bar."""
        super().on_validation_end(trainer, pl_module)
        if self.plain and trainer.is_global_zero and not trainer.sanity_checking:
            values = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val")}
            found = "  ".join(f"{name} {compact(value)}" for name, value in values.items())
            print(f"step {trainer.global_step}  validation  {found}", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The chosen metrics by their shown names, as far as they were logged."""
        logged = trainer.callback_metrics
        return {shown: compact(float(logged[name])) for shown, name in self.metrics.items() if name in logged}

    def line(self, trainer: Trainer, now: float) -> str:
        """`step 120/600  loss 2.31  ppl 10.1  tokens/s 8,400  ETA 3:12`"""
        done = trainer.global_step - self._first_step
        total = trainer.max_steps if trainer.max_steps > 0 else math.nan
        remaining = total - trainer.global_step
        known = done > 1 or not remaining  # the first one warms up
        left = (now - self._started) / done * remaining if done and known else math.nan
        of = f"/{total}" if trainer.max_steps > 0 else ""
        values = "".join(f"  {name} {value}" for name, value in self.get_metrics(trainer, None).items())  # type: ignore[arg-type]
        return f"step {trainer.global_step}{of}{values}  ETA {clock(left)}"

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"
