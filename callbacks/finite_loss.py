"""Stop the run before a loss that is NaN or infinite can spoil the weights.

Watches:  the loss of every batch, before its backward pass.
Acts:     raises NonFiniteLoss on all ranks together; weights and optimizer stay as the last good step left them.
Logs:     nothing.
Requires: any LightningModule with automatic optimization.
Source:   SPEC C2: NaN is a failure at once, and every comparison with it is False.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class NonFiniteLoss(FloatingPointError):
    """A training loss of NaN or ±infinity."""


class FiniteLoss(Callback):
    """Raises NonFiniteLoss where any rank's loss is NaN or infinite. Reads one number per batch from the device."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Judge the loss of this batch; ranks vote, so that none waits for another that has stopped."""
        finite = bool(torch.isfinite(loss.detach()).all())
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        self.judge(finite, loss.detach(), trainer.global_step)

    def judge(self, finite: bool, loss: Any, step: int) -> None:
        """Raise unless all ranks are finite."""
        if not finite:
            raise NonFiniteLoss(
                f"the loss became {float(loss):g} at step {step}, before which the weights are intact: "
                "resume the last checkpoint with a lower optim.lr or optim.clip, or look at the data of that step"
            )
