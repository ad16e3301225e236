"""Stop the run before a loss or a gradient that is NaN or infinite can spoil the weights.

Watches:  the loss of every batch, before its backward pass; the norm of all gradients, before clipping.
Acts:     raises NonFiniteLoss on all ranks together; weights and optimizer stay as the last good step left them.
Logs:     nothing.
Requires: any LightningModule with automatic optimization.
Source:   SPEC C2: NaN is a failure at once, and every comparison with it is False.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer


class NonFiniteLoss(FloatingPointError):
    """A training loss of NaN or ±infinity."""


class FiniteLoss(Callback):
    """Raises NonFiniteLoss where any rank's loss or gradient is NaN or infinite. Reads two numbers a step."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Judge the loss of this batch."""
        self._vote(trainer, "loss", loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the gradients: clipping by a norm of NaN would write NaN into every weight.

        With a loss scaler (16-mixed) it is the scaler that skips such a step.
        """
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self._vote(trainer, "gradient's norm", torch.nn.utils.get_total_norm(gradients))

    def _vote(self, trainer: Trainer, what: str, value: Tensor) -> None:
        """Ranks decide together, so that none waits for another that has stopped."""
        finite = bool(torch.isfinite(value).all())
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        self.judge(finite, value, trainer.global_step, what)

    def judge(self, finite: bool, value: Any, step: int, what: str = "loss") -> None:
        """Raise unless all ranks are finite."""
        if not finite:
            raise NonFiniteLoss(
                f"the {what} became {float(value):g} at step {step}, before which the weights are intact: "
                "resume the last checkpoint with a lower optim.lr or optim.clip, or look at the data of that step"
            )
