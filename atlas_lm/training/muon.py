"""Muon that orthogonalises all matrices of one shape together (arXiv 2502.16982; PyTorch's does one after another).

On a GPU one matrix of a small model is some twenty launches, and the host is slower than the card: 66 matrices of 43m
would take ten milliseconds. On a CPU, and where parameters are sharded, PyTorch's own step runs.
"""

# N matrices of one shape (A, B)

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Muon
from torch.optim._muon import _adjust_lr


class BatchedMuon(Muon):
    """As `torch.optim.Muon`, with its state and its settings."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the closure's loss."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(p.is_cpu or isinstance(p, DTensor) for p in parameters):
            return super().step(closure)
        return self.step_together(closure)

    @torch.no_grad()
    def step_together(self, closure: Any = None) -> Any:
        """The step for whatever device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            grads: list[Tensor] = []
            averages: list[Tensor] = []
            self._init_group(group, parameters, grads, averages)
            if not parameters:
                continue
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, averages, group["momentum"]) if group["nesterov"] else averages
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            shapes: dict[torch.Size, list[int]] = defaultdict(list)
            for n, parameter in enumerate(parameters):
                shapes[parameter.shape].append(n)
            for shape, members in shapes.items():
                update_NAB = torch.stack([updates[n] for n in members])
                update_NAB = orthogonal(update_NAB, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], shape)
                written = [parameters[n] for n in members]
                torch._foreach_add_(written, list(update_NAB.to(written[0].dtype).unbind()), alpha=-rate)
        return loss


def orthogonal(x_NAB: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz of every matrix, in bfloat16 as PyTorch's Muon: (N, A, B) → (N, A, B)."""
    a, b, c = coefficients
    x = x_NAB.bfloat16()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
