"""One message between ranks and one wait for the device in an optimizer step, for all safeguards together.

Each safeguard enters what it has to know, as a ballot, before training: a function that gives a number, on the device
or not. The first that asks in a step has all ballots taken; the others find the answer. It is the largest number of
any rank, and infinite where one is not finite: a flag that is 1 anywhere, a loss that is the worst.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.support.collectives import max_over_ranks
from callbacks.support.gradients import gradient_norm
from callbacks.support.step_loss import step_losses

Ballot = Callable[[Trainer, LightningModule], Tensor | float]


@dataclass
class _Votes:
    ballots: dict[str, Ballot] = field(default_factory=dict)
    batch: int = -1  # the micro-batch of the last vote
    values: dict[str, float] = field(default_factory=dict)


_of_trainer: WeakKeyDictionary[Any, _Votes] = WeakKeyDictionary()


def enter(trainer: Trainer, **ballots: Ballot) -> None:
    """In `on_train_start`. A name stands for one number, whoever enters it."""
    votes = _of_trainer.setdefault(trainer, _Votes())
    votes.ballots.update(ballots)
    votes.batch = -1


def vote(trainer: Trainer, pl_module: LightningModule, name: str) -> float:
    """The number of that name in this optimizer step, the same on all ranks; from `on_before_optimizer_step` on.

    To be called on all ranks. KeyError: nobody has entered it.
    """
    votes = _of_trainer.setdefault(trainer, _Votes())
    batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    if votes.batch != batch or name not in votes.values:
        numbers = {name: ballot(trainer, pl_module) for name, ballot in votes.ballots.items()}
        votes.values, votes.batch = largest(trainer, numbers), batch
    return votes.values[name]


def largest(trainer: Trainer, numbers: dict[str, Tensor | float]) -> dict[str, float]:
    """Of any rank, each; infinite where one is not finite. One wait for the device."""
    device = trainer.strategy.root_device
    wide = torch.float32 if device.type == "mps" else torch.float64
    held = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    told = {name: float(value) for name, value in numbers.items() if not isinstance(value, Tensor)}
    alone = trainer.world_size == 1
    parts = [value.detach().reshape(1).to(device, wide) for value in held.values()]
    if told and not alone:
        parts.append(torch.tensor(list(told.values()), dtype=wide).to(device, non_blocking=True))
    vector = torch.cat(parts) if parts else torch.zeros(0, dtype=wide, device=device)
    vector = max_over_ranks(trainer, vector)
    values = [*vector.tolist(), *(told.values() if alone else ())]
    return {
        name: value if math.isfinite(value) else math.inf for name, value in zip([*held, *told], values, strict=True)
    }


# Ballots that several safeguards enter


def loss_not_finite(trainer: Trainer, pl_module: LightningModule) -> Tensor | float:
    """1 where the loss of a micro-batch of this step is NaN or infinite."""
    losses = step_losses(trainer)
    return torch.stack([loss.float() for loss in losses]).isfinite().all().logical_not() if losses else 0.0


def norm_of_gradients(trainer: Trainer, pl_module: LightningModule) -> Tensor | float:
    """Of this step, before clipping."""
    return gradient_norm(pl_module, trainer.optimizers[0])
