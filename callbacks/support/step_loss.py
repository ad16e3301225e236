"""The loss of the current optimizer step, collected once for all safeguards that judge it.

A step has as many micro-batches as gradients are accumulated over. Lightning divides each micro-batch's loss by that
number, and a loss scaler (16-mixed) multiplies it, before any callback sees it: both are taken back here.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks.support.lightning_internals import logging_step


@dataclass
class _Collected:
    step: int = -1  # the loggers' step, which no rollback sets back
    batch: int = -1  # the last micro-batch that was noted
    losses: list[Tensor] = field(default_factory=list)


_of_trainer: WeakKeyDictionary[Any, _Collected] = WeakKeyDictionary()


def begin_step_losses(trainer: Trainer) -> None:
    """In `on_train_start`: a window that was cut short leaves nothing after."""
    _of_trainer[trainer] = _Collected()


def note_loss(trainer: Trainer, loss: Tensor) -> None:
    """In `on_before_backward`, by every safeguard that reads losses: the first call of a micro-batch counts."""
    found = _of_trainer.setdefault(trainer, _Collected())
    batch, step = trainer.fit_loop.epoch_loop.batch_progress.total.ready, logging_step(trainer)
    if batch == found.batch:
        return
    if step != found.step:
        found.step, found.losses = step, []
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = scaler.get_scale() if scaler is not None else 1.0
    found.losses.append(loss.detach() * (trainer.accumulate_grad_batches / scale))
    found.batch = batch


def step_losses(trainer: Trainer) -> list[Tensor]:
    """Of the micro-batches of this optimizer step so far, on this rank, as training_step returned them.

    Until the step's end. Empty where training_step has skipped them all.
    """
    found = _of_trainer.get(trainer)
    return list(found.losses) if found is not None and found.step == logging_step(trainer) else []


def mean_step_loss(trainer: Trainer) -> Tensor:
    """Their mean; NaN where there is none."""
    losses = step_losses(trainer)
    return torch.stack(losses).float().mean() if losses else torch.tensor(torch.nan)
