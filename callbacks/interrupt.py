"""Ctrl-C and a scheduler's signals end a run between two steps, with a checkpoint from which it continues exactly.

Watches:  SIGINT; SIGTERM and SIGUSR1, which schedulers send before they preempt a job or its time is up. An end in the
          middle of a step would leave weights half updated and lose a batch on resume.
Acts:     finishes the step (and the validation after it), saves `path`, stops all ranks together. After SIGTERM and
          SIGUSR1 the process ends with `requeue_exit_code`, which asks to be resumed. A second Ctrl-C stops at once.
          With several ranks a signal that comes after a step's vote (support/step_vote.py) waits for the next step's.
Logs:     nothing.
Requires: any LightningModule.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from callbacks.support.step_end import open_step_ends, save, wait_for_files
from callbacks.support.step_vote import enter, largest, vote

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """A scheduler's signal ended the run; everything is saved. `code` is the exit code of the process."""

    def __init__(self, code: int, message: str, number: int = 0) -> None:
        super().__init__(code)
        self.message, self.signal = message, number

    def __str__(self) -> str:
        return self.message


class Interrupt(Checkpoint):
    """Saves `path` and raises at the end of the step in which the signal came: KeyboardInterrupt, or Preempted.

    `requeue_exit_code`: 75 is EX_TEMPFAIL of sysexits.h, "try again". ValueError: outside 1 to 255.

    A `Checkpoint` by type: Lightning runs these last, when the step is complete.
    """

    def __init__(self, path: str, requeue_exit_code: int = 75) -> None:
        if not 1 <= requeue_exit_code <= 255:
            raise ValueError(f"requeue_exit_code={requeue_exit_code} of interrupt must lie in 1 to 255; 0 is success")
        self.path, self.requeue_exit_code = path, requeue_exit_code
        self.received = 0  # number of the signal
        self._validated = False  # in this step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for `on_step_end`."""
        open_step_ends(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; Lightning gives every one back when `fit` ends, in whatever way."""
        self.received = 0
        enter(trainer, signal=self._ballot)
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, *PREEMPTING):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        hint = "; press it again to stop at once" if number == signal.SIGINT else ""
        rank_zero_info(f"\n{self._name(number)}: finishing this step and saving{hint}")

    def _ballot(self, trainer: Trainer, pl_module: LightningModule) -> float:
        return float(self.received)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It may have taken long."""
        self._validated = True

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here if a signal has reached any rank: before this step's vote, or this rank where it is alone."""
        received = self.received if trainer.world_size == 1 else int(vote(trainer, pl_module, "signal"))
        if self._validated and trainer.world_size > 1:
            received = int(largest(trainer, {"signal": float(self.received)})["signal"])
        self._validated = False
        if not received:
            return
        save(trainer, self.path)
        wait_for_files(trainer)
        rank_zero_info(f"saved {self.path}")
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        name = self._name(received)
        raise Preempted(
            self.requeue_exit_code,
            f"{name} at step {trainer.global_step}, all is saved, it can be resumed",
            received,
        )

    @staticmethod
    def _name(number: int) -> str:
        return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
