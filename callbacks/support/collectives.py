"""Decide together: every judgement of a safeguard is one on all ranks, so that none waits for another for ever.

With one rank these are the identity. Every rank has to call them, in the same order. ProcessGroupGone where there are
more and no group.
"""

import math
import sys
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class ProcessGroupGone(RuntimeError):
    """The ranks can no longer decide together: a rank was lost, and the group was ended."""


entered: tuple[int, str] = (0, "none")  # how many of these this rank has entered, and the last one; for hang_watch


def any_rank(trainer: Trainer, flag: bool) -> bool:
    """Whether `flag` is True on at least one rank."""
    if trainer.world_size == 1:
        return flag
    _entering("any_rank")
    return trainer.strategy.reduce_boolean_decision(flag, all=False)


def mean_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The mean of each number; NaN or infinity on one rank is NaN or infinity on all."""
    if trainer.world_size == 1:
        return values
    _entering("mean_over_ranks")
    return _reduced(trainer, values, "mean")


def max_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The largest of each number of the device; what is not finite counts as infinity, as a maximum may pass NaN over.

    Without Lightning's own reduction, which waits at a barrier first.
    """
    found = values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    if trainer.world_size > 1:
        _entering("max_over_ranks")
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found


def _reduced(trainer: Trainer, values: Tensor, operation: str) -> Tensor:
    moved = values.detach().to(trainer.strategy.root_device).clone()
    return trainer.strategy.reduce(moved, reduce_op=operation).to(values.device)


def gathered(trainer: Trainer, value: Any) -> list[Any]:
    """Each rank's picklable `value`, in the order of the ranks."""
    if trainer.world_size == 1:
        return [value]
    _entering("gathered")
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def parts_of_ranks(trainer: Trainer, part: Tensor) -> list[Tensor]:
    """Each rank's tensor, all of one length, in the order of the ranks, on the device of `part`."""
    if trainer.world_size == 1:
        return [part]
    _entering("parts_of_ranks")
    mine = part.to(trainer.strategy.root_device)
    found = [torch.empty_like(mine) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(found, mine)
    return [other.to(part.device) for other in found]


def _entering(name: str) -> None:
    """Note the collective, and which module asked for it.

    ProcessGroupGone: after `hang_watch` has ended the group, Lightning's own reductions give back what they get, and a
    rank would continue with gradients that were never summed.
    """
    global entered
    if not torch.distributed.is_initialized():
        raise ProcessGroupGone(f"{name}: the process group is gone, a rank was lost: resume the run")
    entered = (entered[0] + 1, f"{name} of {sys._getframe(2).f_globals.get('__name__')}")
