"""Let auxiliary losses guide the beginning of a run, then fade; and take them away while a watched metric degrades.

Watches:  the logged metric `watch`, averaged over ranks and steps, against its best average.
Acts:     sets the weight of each named loss at the beginning of every step: held for the first `hold` of the run, then
          decayed exponentially to 1/`decay`; or, with `stages`, as the epoch has it. If the average rises above its
          best by more than `tolerance`, or the metric is not finite, all weights are 0 for `rest_steps` and come back
          `backoff` times as large. Warns where the run ends before the first of its stages.
Logs:     loss_weight_schedule/<name> at the steps at which Lightning logs.
Requires: HasLossWeights. Keeps level, rest, average and best in the checkpoint.
Source:   M15, C8: guard losses ten times the main loss have destroyed a run.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.support.collectives import mean_over_ranks
from callbacks.support.lightning_internals import accumulates, is_logging_step
from callbacks.support.probing import record
from callbacks.support.ranges import Range, at_least, between, check, share

log = logging.getLogger(__name__)


@runtime_checkable
class HasLossWeights(Protocol):
    """All that this schedule knows of the module."""

    loss_weights: dict[str, float]
    """Names of the auxiliary losses and their weights now."""

    def set_loss_weight(self, name: str, weight: float) -> None:
        """Use this weight from the next step on."""
        ...


def _by_epoch(stages: Sequence[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Epoch → weights, in order. ValueError: a stage without an epoch from 1 on, or two of one epoch."""
    found: dict[int, dict[str, float]] = {}
    for stage in sorted(stages, key=lambda stage: float(stage.get("epoch", 0))):
        epoch = stage.get("epoch", 0)
        if epoch != int(epoch) or epoch < 1 or epoch in found:
            raise ValueError(
                f"stages of loss_weight_schedule: {dict(stage)} must name an epoch of its own from 1 on, such as "
                "{epoch: 6, direction: 0.002}"
            )
        found[int(epoch)] = {str(name): float(weight) for name, weight in stage.items() if name != "epoch"}
    return found


class LossWeightSchedule(Callback):
    """`weights`: name of a loss → its weight at the start; null: leave it alone. `smoothing`: weight of the newest
    value in the average. `stages`: of each the `epoch`, 1 the first, and the weights from then on, in place of
    `weights` and their decay; 0 where one is absent.

    `watch` falls when training goes well; None: the schedule alone. ValueError: a value out of its range.
    """

    def __init__(
        self,
        weights: Mapping[str, float | None],
        total_steps: int,
        hold: float = 0.1,
        decay: float = 100.0,
        watch: str | None = None,
        tolerance: float = 0.05,
        rest_steps: int = 100,
        backoff: float = 0.5,
        smoothing: float = 0.1,
        every_n_steps: int = 1,
        stages: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        self.weights = {str(name): float(weight) for name, weight in weights.items() if weight is not None}
        self.stages = _by_epoch(stages or [])
        every = [*self.weights.items(), *(item for stage in self.stages.values() for item in stage.items())]
        wrong = {name: weight for name, weight in every if not (math.isfinite(weight) and weight >= 0)}
        if wrong or not self.weights:
            raise ValueError(
                f"weights={wrong or {}} of loss_weight_schedule must name losses with weights of at least 0"
            )
        check(
            "loss_weight_schedule", total_steps=(total_steps, at_least(1, "the run's number of steps")),
            hold=(hold, Range(lambda value: 0 <= value < 1, "lie in [0, 1), a share of the run")),
            decay=(decay, at_least(1, "which decays nothing")), tolerance=(tolerance, at_least(0, "0.05 means 5 %")),
            rest_steps=(rest_steps, at_least(1)), backoff=(backoff, between(0, 1)), smoothing=(smoothing, share()),
            every_n_steps=(every_n_steps, at_least(1)),
        )  # fmt: skip
        self.total_steps, self.hold, self.decay = total_steps, hold, decay
        self.tolerance, self.rest_steps, self.backoff, self.smoothing = tolerance, rest_steps, backoff, smoothing
        self.every_n_steps = every_n_steps
        self.watch = watch if any(weight for _, weight in every) else None  # nothing to take away from weights of 0
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.level = 1.0  # what back-offs have left of the schedule
        self.resting_until = 0  # step at which the weights come back
        self.average: float | None = None
        self.best: float | None = None
        self._validated = False

    def factor(self, step: int) -> float:
        """Share of its weight that a loss has at optimizer step `step`."""
        if step < self.resting_until:
            return 0.0
        progress = (step / self.total_steps - self.hold) / (1 - self.hold)
        return self.level * self.decay ** -min(1.0, max(0.0, progress))

    def weights_at(self, step: int, epoch: int) -> dict[str, float]:
        """The weight of each loss at optimizer step `step`, in epoch `epoch`, 1 the first."""
        if not self.stages:
            factor = self.factor(step)
            return {name: weight * factor for name, weight in self.weights.items()}
        begun = [stage for first, stage in self.stages.items() if first <= epoch]
        level = 0.0 if step < self.resting_until else self.level
        stage = begun[-1] if begun else self.weights
        return {name: level * stage.get(name, 0.0) for name in self._names()}

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self.weights, *(name for stage in self.stages.values() for name in stage)]))

    def judge(self, value: float, step: int) -> bool:
        """Take in the metric as it is after `step` steps; whether the weights have to rest from now on.

        What is not finite stays out of the average, which it would spoil for ever. While the weights rest there is
        nothing to take away: the best follows the average, so that the judgement begins again when they come back.
        """
        resting = 0 < step <= self.resting_until  # the step before this moment ran without them
        finite = math.isfinite(value)
        if finite:
            before = value if self.average is None else self.average
            self.average = before + self.smoothing * (value - before)
            lower = self.best is None or self.average < self.best
            degraded = not lower and self.average - (self.best or 0.0) > self.tolerance * abs(self.best or 0.0)
            if lower or resting:
                self.best = self.average
        if resting or (finite and not degraded):
            return False
        self.level *= self.backoff
        self.resting_until = step + self.rest_steps
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError: the module lets nobody set its weights. ValueError: it knows no loss of a name."""
        if stage == "fit":
            self.reset()
        if not isinstance(pl_module, HasLossWeights):
            missing = [
                name for name in ("loss_weights", "set_loss_weight()") if not hasattr(pl_module, name.strip("()"))
            ]
            raise TypeError(
                f"loss_weight_schedule needs {' and '.join(missing)}, which {type(pl_module).__name__} lacks"
            )
        unknown = [name for name in self._names() if name not in pl_module.loss_weights]
        if unknown:
            known = ", ".join(pl_module.loss_weights) or "none"
            raise ValueError(
                f"weights of loss_weight_schedule: there is no loss {', '.join(unknown)}; there are {known}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where the run is too short for any of the stages."""
        weighted = [epoch for epoch, stage in self.stages.items() if any(stage.values())]
        batches = trainer.num_training_batches
        if not weighted or trainer.max_steps < 0 or not math.isfinite(batches):
            return
        epochs = math.ceil(trainer.max_steps / max(1, batches // trainer.accumulate_grad_batches))
        if epochs < min(weighted) and trainer.is_global_zero:
            log.warning(
                "loss_weight_schedule: the stages begin in epoch %d, and %d steps are %d epochs: these losses are "
                "never used; raise optim.total_steps, or let them begin earlier",
                min(weighted), trainer.max_steps, epochs,
            )  # fmt: skip

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a metric of validation must be there."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Weights of this step, the same for all of an accumulation window."""
        assert isinstance(pl_module, HasLossWeights)
        weights = self.weights_at(trainer.global_step, trainer.current_epoch + 1)
        for name, weight in weights.items():
            pl_module.set_loss_weight(name, weight)
        if is_logging_step(trainer):
            record(trainer, {f"loss_weight_schedule/{name}": weight for name, weight in weights.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the watched metric if it is time."""
        if self.watch is None or accumulates(trainer) or trainer.global_step % self.every_n_steps:
            return
        logged = trainer.callback_metrics
        if self.watch not in logged:
            if trainer.enable_validation and not self._validated:
                return  # validation may log it yet
            raise ValueError(
                f"watch={self.watch} of loss_weight_schedule was not logged; there are {', '.join(logged)}"
            )
        value = float(mean_over_ranks(trainer, torch.as_tensor(logged[self.watch]).float()))
        if self.judge(value, trainer.global_step) and trainer.is_global_zero:
            log.warning(
                "step %d: %s has degraded (now %g, average %s, best %s): loss weights rest until step %d, then at %g",
                trainer.global_step, self.watch, value, self.average, self.best, self.resting_until, self.level,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Level, rest, average and best."""
        state = {name: getattr(self, name) for name in ("level", "resting_until", "average", "best")}
        return {**state, "of": self.watch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.level, self.resting_until = state_dict["level"], state_dict["resting_until"]
        if state_dict.get("of", self.watch) == self.watch:  # another metric's say nothing about this one
            self.average, self.best = state_dict["average"], state_dict["best"]
