"""Ctrl-C ends a run at a step's border, with a checkpoint from which it goes on exactly.

Watches:  SIGINT. An interrupt in the middle of a step would leave weights half updated and lose a batch on resume.
Acts:     first Ctrl-C: finishes the step, saves `path`, stops all ranks together. Second Ctrl-C: stops at once.
Logs:     nothing.
Requires: any LightningModule.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info


class Interrupt(Checkpoint):
    """Saves `path` and raises KeyboardInterrupt at the end of the step in which Ctrl-C was pressed.

    A `Checkpoint` by type: Lightning runs these last, when the step is complete.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.requested = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C; Lightning gives every signal back when `fit` ends, in whatever way."""
        self.requested = False
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        rank_zero_info("\nCtrl-C: finishing this step and saving; press it again to stop at once")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if Ctrl-C was pressed on any rank."""
        if trainer.fit_loop._should_accumulate():
            return
        requested = self.requested
        if trainer.world_size > 1:
            requested = trainer.strategy.reduce_boolean_decision(requested, all=False)
        if requested:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise KeyboardInterrupt
