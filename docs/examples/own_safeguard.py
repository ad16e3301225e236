"""A safeguard of one's own, in the form that those in callbacks/ have.

Watches:  the training loss of every batch, the worst rank's.
Acts:     raises LossTooHigh on all ranks together when `patience` batches in a row lie above `ceiling`.
Logs:     nothing.
Requires: any LightningModule whose training_step returns a loss. Keeps its streak in the checkpoint.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.support.collectives import max_over_ranks


class LossTooHigh(RuntimeError):
    """The training loss has stayed above its ceiling."""


class LossCeiling(Callback):
    """`ceiling`: nats per token. `patience`: batches. ValueError: a patience below 1."""

    def __init__(self, ceiling: float, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} of loss_ceiling must be at least 1")
        self.ceiling, self.patience = ceiling, patience
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.streak = 0

    def judge(self, loss: float) -> bool:
        """Whether to stop: a decision on plain numbers, apart from the hooks. NaN is above every ceiling."""
        self.streak = 0 if loss <= self.ceiling else self.streak + 1
        return self.streak >= self.patience

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(max_over_ranks(trainer, outputs["loss"].detach()))  # the same on all ranks: they stop together
        if self.judge(loss):
            raise LossTooHigh(
                f"loss {loss:.4g} at step {trainer.global_step}: {self.streak} batches in a row above "
                f"ceiling={self.ceiling}; resume the last checkpoint with a lower learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"streak": self.streak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.streak = state_dict["streak"]
