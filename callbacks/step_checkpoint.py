"""Keep the newest checkpoints of a run, counted in optimizer steps and in minutes, the final one included.

Watches:  the step counter, and rank zero's clock.
Acts:     saves every `every_n_steps`, `every_n_minutes` after the last save, and at the end; keeps the newest `keep`;
          `last.ckpt` links to the newest. Saves when a step is complete: see support/step_end.py.
Logs:     perf/checkpoint_stall_seconds, how long training waited for the last save, once for each.
Requires: any LightningModule.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from callbacks.support.checkpoint_order import by_step
from callbacks.support.lightning_internals import accumulates, is_logging_step
from callbacks.support.probing import record
from callbacks.support.ranges import above, at_least, check
from callbacks.support.step_end import after_writing, file_failed, open_step_ends, save, wait_for_files
from callbacks.support.step_vote import enter, vote

log = logging.getLogger(__name__)

LAST = "last.ckpt"
STALL = "perf/checkpoint_stall_seconds"


class StepCheckpoint(Checkpoint):
    """Saves `folder`/step-<step>.ckpt.

    `every_n_minutes` None: by steps alone. ValueError: a value of 0 or less.
    """

    def __init__(self, folder: str, every_n_steps: int, keep: int = 2, every_n_minutes: float | None = None) -> None:
        check("checkpoint", every_n_steps=(every_n_steps, at_least(1)), keep=(keep, at_least(1)))
        if every_n_minutes is not None:
            check("checkpoint", every_n_minutes=(every_n_minutes, above(0, "or null for never")))
        self.dirpath = str(folder)  # under this name a rollback looks for the folders of checkpoints
        self.every_n_steps, self.keep, self.every_n_minutes = every_n_steps, keep, every_n_minutes
        self._last_global_step_saved = 0  # so named for a rollback, which sets it back: steps that come again are saved
        self._saved_at = 0.0  # monotonic seconds
        self._stall: float | None = None  # seconds of the last save, until they are logged

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for `on_step_end`."""
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        open_step_ends(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; what a resumed run starts from is saved already."""
        self._last_global_step_saved, self._saved_at = trainer.global_step, time.monotonic()
        self._stall = None
        enter(trainer, file_failed=file_failed)
        if self.every_n_minutes is not None:
            enter(trainer, time_to_save=self._time_is_up)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the last save's stall: at its own step the records were closed before it."""
        if self._stall is not None and not accumulates(trainer) and is_logging_step(trainer):
            record(trainer, {STALL: self._stall})
            self._stall = None

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is time. OSError on all ranks: a file could not be written in the background."""
        if vote(trainer, pl_module, "file_failed"):
            wait_for_files(trainer)
            raise OSError("another rank could not write its checkpoint: its log says why")
        late = self.every_n_minutes is not None and vote(trainer, pl_module, "time_to_save")
        # at the end of training Lightning counts the epoch as done: a run that is given more steps would skip the rest
        last = trainer.global_step == trainer.max_steps
        if trainer.global_step % self.every_n_steps == 0 or late or last:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, where training ends before `max_steps`; all files are there afterwards."""
        self._save(trainer)
        wait_for_files(trainer)

    def _time_is_up(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """By rank zero's clock, before the step."""
        assert self.every_n_minutes is not None
        return float(trainer.is_global_zero and time.monotonic() - self._saved_at > 60 * self.every_n_minutes)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._last_global_step_saved:
            return
        path = Path(self.dirpath) / f"step-{trainer.global_step:07d}.ckpt"
        start = time.perf_counter()
        save(trainer, path)
        self._stall = time.perf_counter() - start
        self._last_global_step_saved, self._saved_at = trainer.global_step, time.monotonic()

        def follow() -> None:
            self._link(path)
            self._remove_oldest(trainer, path)

        after_writing(trainer, follow)

    @rank_zero_only  # others would list files that are just being removed
    def _remove_oldest(self, trainer: Trainer, newest: Path) -> None:
        """Also those of a process that was killed."""
        steps = by_step(newest.parent, "step")
        where = steps.index(newest) if newest in steps else len(steps)
        others = [*steps[where + 1 :], *steps[:where]]  # first what lies ahead: damaged, or of a past that was left
        for old in others[: max(0, len(others) - (self.keep - 1))]:
            trainer.strategy.remove_checkpoint(old)

    @rank_zero_only
    def _link(self, path: Path) -> None:
        """Let `last.ckpt` point to `path`. Atomic: a reader finds the old one or the new one."""
        temporary = path.with_name(f".{LAST}.{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(path.name)
            os.replace(temporary, path.with_name(LAST))
        except OSError as error:  # the checkpoint itself is there, and not every file system has links
            log.warning("%s does not link to %s: %s", LAST, path.name, error)
