"""Skip a step whose loss or gradient is NaN or infinite, and stop the run when too many follow one another.

Watches:  the loss of every micro-batch of a step; the norm of all gradients, before clipping.
Acts:     drops the gradients on all ranks together: weights and moments stay. More than `max_consecutive` such steps
          in a row raise NonFiniteTraining on all ranks. With a loss scaler (16-mixed) it is the scaler that skips.
Logs:     nonfinite_guard/skipped_steps, when it grows.
Requires: any LightningModule with automatic optimization; with HasGradientNorm it takes less time. Keeps its counters
          in the checkpoint.
Source:   C2: NaN is a failure at once, and every comparison with it is False.
"""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from callbacks.support.collectives import any_rank, gathered
from callbacks.support.gradients import gradients
from callbacks.support.probing import record
from callbacks.support.ranges import at_least, check
from callbacks.support.step_loss import begin_step_losses, note_loss, step_losses
from callbacks.support.step_vote import enter, loss_not_finite, norm_of_gradients, vote


class NonFiniteTraining(FloatingPointError):
    """Losses or gradients of NaN or ±infinity, more steps in a row than allowed."""


def largest(gradients: list[Tensor]) -> Tensor:
    """The largest |g| of what this rank holds: finite where every gradient is."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    local = [g for g in local if g.numel()]  # a rank may hold no row of a small parameter: an empty one has no maximum
    return torch.nn.utils.get_total_norm(local, norm_type=math.inf)


class NonfiniteGuard(Callback):
    """Allows `max_consecutive` non-finite steps in a row, skips them and stops at the next; 0 stops at the first one.

    ValueError if it is negative.
    """

    survives_rollback = True  # else a run that is rolled back to the same bad data would count from 0 for ever

    def __init__(self, max_consecutive: int) -> None:
        check("nonfinite_guard", max_consecutive=(max_consecutive, at_least(0, "which stops at the first bad step")))
        self.max_consecutive = max_consecutive
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.skipped = 0  # of the whole run
        self.streak: list[str] = []  # what was wrong, one entry per consecutive skipped step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start clean."""
        if stage == "fit":
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A window that was cut short leaves nothing to judge."""
        begin_step_losses(trainer)
        enter(trainer, loss_not_finite=loss_not_finite, gradient_norm=norm_of_gradients)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note it; reading it now would wait for the forward pass."""
        note_loss(trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the window: no wait, and no message between ranks, of its own unless something is wrong."""
        suspect = vote(trainer, pl_module, "loss_not_finite") or vote(trainer, pl_module, "gradient_norm") == math.inf
        # or the squares of large finite ones overflow: so each gradient is looked at
        loss = suspect and not all(map(math.isfinite, step_losses(trainer)))
        gradient = suspect and not bool(largest(gradients(optimizer)).isfinite())
        if not suspect or not any_rank(trainer, loss or gradient):
            self.streak.clear()
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled:
            optimizer.zero_grad(set_to_none=True)  # never times 0: 0 · NaN is NaN
        by_rank = gathered(trainer, (loss, gradient))
        where = {
            name: [rank for rank, both in enumerate(by_rank) if both[i]] for i, name in enumerate(("loss", "gradient"))
        }
        self.count(trainer.global_step, where)
        record(trainer, {"nonfinite_guard/skipped_steps": self.skipped})
        # a scaler overflows while it looks for its scale, but no scale helps against a loss of NaN
        self.judge(may_stop=bool(where["loss"]) or not scaled)

    def count(self, step: int, where: dict[str, list[int]]) -> None:
        """One more skipped step; `where`: the ranks on which the loss and the gradient were not finite."""
        self.skipped += 1
        wrong = [f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in where.items() if ranks]
        self.streak.append(f"step {step} ({'; '.join(wrong)})")

    def judge(self, may_stop: bool = True) -> None:
        """Raise if too many steps in a row were skipped."""
        if may_stop and len(self.streak) > self.max_consecutive:
            raise NonFiniteTraining(
                f"NaN or infinity in {', '.join(self.streak)}: more than max_consecutive={self.max_consecutive} in a "
                "row; the weights are intact: resume the last checkpoint with a lower optim.lr or optim.clip, or look "
                "at the data of these steps"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"skipped": self.skipped, "streak": list(self.streak)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.skipped, self.streak = state_dict["skipped"], list(state_dict["streak"])
