"""The norm of a step's gradients, which training itself, guards and clipping all ask for: computed once a step."""

from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


@runtime_checkable
class HasGradientNorm(Protocol):
    """A module that keeps the norm until the gradients change."""

    def gradient_norm(self) -> Tensor:
        """2-norm of the gradients of this optimizer step as they are now, shards of other ranks included.

        A callback that changes them does so in place by autograd's own means, not through `.data`.
        """
        ...


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Those that the optimizer is about to use."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def gradient_norm(pl_module: LightningModule, optimizer: Optimizer) -> Tensor:
    """2-norm of all gradients; to be called on all ranks. Infinite where squares overflow, NaN where one is."""
    if isinstance(pl_module, HasGradientNorm):
        return pl_module.gradient_norm()
    norm = torch.nn.utils.get_total_norm(gradients(optimizer))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
