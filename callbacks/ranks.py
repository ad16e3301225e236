"""Decide together: every judgement of a safeguard is one on all ranks, so that none waits for another for ever.

With one rank these are the identity. Every rank has to call them, in the same order.
"""

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def any_rank(trainer: Trainer, flag: bool) -> bool:
    """Whether `flag` is True on at least one rank."""
    return trainer.strategy.reduce_boolean_decision(flag, all=False) if trainer.world_size > 1 else flag


def mean_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The mean of each number; NaN or infinity on one rank is NaN or infinity on all."""
    return _reduced(trainer, values, "mean")


def max_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The largest of each number; what is not finite counts as infinity, as a maximum may pass NaN over."""
    return _reduced(trainer, values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf), "max")


def _reduced(trainer: Trainer, values: Tensor, operation: str) -> Tensor:
    if trainer.world_size == 1:
        return values
    moved = values.detach().to(trainer.strategy.root_device).clone()
    return trainer.strategy.reduce(moved, reduce_op=operation).to(values.device)


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """Each rank's picklable `value`, in the order of the ranks."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
