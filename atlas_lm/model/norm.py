"""Root-mean-square norm: PyTorch's, on a CPU as compiled code (`memory/kernels/norm.py`)."""

# B batch, H heads, T tokens, D channels of a head

import torch
from torch import Tensor, nn

from atlas_lm.memory.kernels import norm as kernel


class RMSNorm(nn.RMSNorm):
    """As PyTorch's, of (…, D). ValueError for another D."""

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x)
        if x.dim() == 3 and kernel.can_run(x, self.weight):
            return kernel.normalise(x.unsqueeze(1), self.weight, _epsilon(self, x))
        return super().forward(x)


def normalised_heads(norm: nn.RMSNorm, x_BHTD: Tensor) -> Tensor:
    """Every head normalised, then all side by side: (B, H, T, D) → (B, T, H·D)."""
    _check(norm, x_BHTD)
    if kernel.can_run(x_BHTD, norm.weight):
        return kernel.normalise(x_BHTD, norm.weight, _epsilon(norm, x_BHTD))
    return norm(x_BHTD).transpose(1, 2).flatten(2)


def _check(norm: nn.RMSNorm, x: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1:] != norm.weight.shape:
        shapes = f"{tuple(x.shape)} for a norm of {tuple(norm.weight.shape)}"
        raise ValueError(f"the last axis must be as wide as the norm's weight, got {shapes}")


def _epsilon(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
