"""Skip a step whose loss lies far above those before it: garbage in the data, or a model that has just broken.

Watches:  the loss of every optimizer step, the worst rank's, against the median of the last `window` accepted ones.
Acts:     drops the gradients of an outlier on all ranks together: weights and moments stay. When `streak` or more in a
          row are over, requests a rollback of the first callback that can (`CanRollBack`), so that the steps which they
          cost are trained after all. More than `max_consecutive` in a row raise LossOutliers on all ranks.
Logs:     outlier_guard/outliers, when it grows.
Requires: any LightningModule with automatic optimization. Keeps the window in the checkpoint.
Source:   a held-out perplexity that creeps up by less than its threshold between two evaluations is no spike to C2, and
          twenty batches of noise at a low learning rate do just that (docs/decisions/0031-outlier-guard.md).
"""

import logging
import math
import statistics
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.support.probing import record
from callbacks.support.ranges import above, at_least, check
from callbacks.support.rollback_request import who_can_roll_back
from callbacks.support.step_loss import begin_step_losses, mean_step_loss, note_loss
from callbacks.support.step_vote import enter, vote

log = logging.getLogger(__name__)

SIGMA = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
LEAST = 0.02  # of the median: the least deviation, for losses that hardly vary


class LossOutliers(RuntimeError):
    """More steps in a row than allowed had a loss far above those before."""


class OutlierGuard(Callback):
    """`deviations`: robust standard deviations above the median that make an outlier. `warm_up`: accepted steps before
    anything is one. ValueError: a value out of its range."""

    def __init__(
        self, deviations: float = 8.0, window: int = 50, warm_up: int = 30, streak: int = 3, max_consecutive: int = 100
    ) -> None:
        check(
            "outlier_guard", warm_up=(warm_up, at_least(2)), window=(window, at_least(warm_up, "which is warm_up")),
            streak=(streak, at_least(1)), max_consecutive=(max_consecutive, at_least(streak, "which is streak")),
            deviations=(deviations, above(0, "8 is far out")),
        )  # fmt: skip
        self.deviations, self.warm_up, self.streak, self.max_consecutive = deviations, warm_up, streak, max_consecutive
        self.window = window
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.losses: deque[float] = deque(maxlen=self.window)  # of accepted steps
        self.outliers = 0  # steps skipped, those of abandoned timelines included
        self.consecutive = 0
        self._training = False

    def limit(self) -> float:
        """The largest loss that is no outlier; infinite until there is enough to compare with."""
        if len(self.losses) < self.warm_up:
            return math.inf
        median = statistics.median(self.losses)
        spread = SIGMA * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.deviations * max(spread, LEAST * abs(median))

    def judge(self, loss: float, limit: float | None = None) -> bool:
        """Whether a loss is an outlier. One that is not finite is another guard's business, and is not learned from."""
        if not math.isfinite(loss):
            return False
        if loss > (self.limit() if limit is None else limit):
            return True
        self.losses.append(loss)
        return False

    @property
    def blocks_snapshot(self) -> bool:
        """In the middle of a streak: a snapshot of now would have lost its steps already."""
        return self.consecutive > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Training has not begun."""
        if stage == "fit":
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A window that was cut short leaves nothing to judge."""
        begin_step_losses(trainer)
        enter(trainer, step_loss=lambda trainer, _: mean_step_loss(trainer))
        self._training = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note it."""
        note_loss(trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge them together."""
        loss, limit = vote(trainer, pl_module, "step_loss"), self.limit()
        if not self.judge(loss, limit):
            if self.consecutive >= self.streak:
                self._regain(trainer, self.consecutive)
            self.consecutive = 0
            return
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # a scaler wants to see its gradients
            optimizer.zero_grad(set_to_none=True)  # never times 0: 0 · NaN is NaN
        self.outliers, self.consecutive = self.outliers + 1, self.consecutive + 1
        record(trainer, {"outlier_guard/outliers": self.outliers})
        what = f"loss {loss:.4g} at step {trainer.global_step}, above {limit:.4g}"
        if self.consecutive > self.max_consecutive:
            raise LossOutliers(
                f"{what}: {self.consecutive} such steps in a row are more than max_consecutive={self.max_consecutive}; "
                "the weights are intact: look at the data of these steps; if it is meant, resume the last checkpoint "
                "without outlier_guard"
            )
        if self.consecutive == 1 and trainer.is_global_zero:
            log.warning("%s: skipped", what)

    def _regain(self, trainer: Trainer, skipped: int) -> None:
        able = who_can_roll_back(trainer)
        if able is not None:
            able.request_rollback(
                f"{skipped} steps with outlying losses were skipped before step {trainer.global_step}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The window and the counts."""
        return {"losses": list(self.losses), "outliers": self.outliers, "consecutive": self.consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there; what has happened stays counted when a rollback restores an older state."""
        self.losses.clear()
        self.losses.extend(state_dict["losses"])
        self.outliers = max(self.outliers, state_dict["outliers"])
        self.consecutive = 0 if self._training else state_dict["consecutive"]  # a rollback ends a streak
