"""Root-mean-square norm on a CPU, as compiled code: one pass over memory each way, heads merged behind it."""

# B batch, H heads, T tokens, D channels of a head

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels.compiled import WIDE, Field, Function, once_differentiable, plain

_norm = Function(
    "norm",
    ("B", "H", "T", "D", "block"),
    ("epsilon",),
    (
        Field("x", ("B", "H", "T", "D"), WIDE),
        Field("weight", ("D",), WIDE),
        Field("y", ("B", "T", "H*D"), WIDE),
        Field("scales", ("B", "H", "T"), WIDE),
        Field("dy", ("B", "T", "H*D"), WIDE),
        Field("dx", ("B", "H", "T", "D"), WIDE),
        Field("dweight", ("rows", "D"), WIDE),
    ),
)

BLOCK = 256  # tokens of a piece of work


class RMSNorm(nn.RMSNorm):
    """As PyTorch's, of (…, D). ValueError for another D."""

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x)
        if x.dim() == 3 and _can_run(x, self.weight):
            return _compiled(x.unsqueeze(1), self.weight, _epsilon(self, x))
        return super().forward(x)


def normalised_heads(norm: nn.RMSNorm, x_BHTD: Tensor) -> Tensor:
    """Every head normalised, then all side by side: (B, H, T, D) → (B, T, H·D)."""
    _check(norm, x_BHTD)
    if _can_run(x_BHTD, norm.weight):
        return _compiled(x_BHTD, norm.weight, _epsilon(norm, x_BHTD))
    return norm(x_BHTD).transpose(1, 2).flatten(2)


def _check(norm: nn.RMSNorm, x: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1:] != norm.weight.shape:
        shapes = f"{tuple(x.shape)} for a norm of {tuple(norm.weight.shape)}"
        raise ValueError(f"the last axis must be as wide as the norm's weight, got {shapes}")


@torch.compiler.disable  # it calls into a library with addresses
def _compiled(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _Norm.apply(x, weight, epsilon)


def _epsilon(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


def _can_run(x: Tensor, weight: Tensor) -> bool:
    known = x.device.type == "cpu" and x.dtype == weight.dtype and (x.dtype, x.dtype) in compiled.KINDS
    return known and x.numel() > 0 and compiled.library() is not None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, weight = plain(x), plain(weight)
        B, H, T, D = x.shape
        y, scales = x.new_empty(B, T, H * D), x.new_empty(B, H, T)
        _call(epsilon, {"x": x, "weight": weight, "y": y, "scales": scales})
        ctx.save_for_backward(x, weight, scales)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, scales = ctx.saved_tensors
        B, _, T, D = x.shape
        dx, dweight = torch.empty_like(x), x.new_empty(B * -(-T // BLOCK), D)
        tensors = {"x": x, "weight": weight, "scales": scales, "dy": plain(dy), "dx": dx, "dweight": dweight}
        _call(ctx.epsilon, tensors)
        return dx, dweight.sum(0), None


def _call(epsilon: float, tensors: dict[str, Any]) -> None:
    x = tensors["x"]
    B, H, T, D = x.shape
    sizes = {"B": B, "H": H, "T": T, "D": D, "block": BLOCK, "rows": B * -(-T // BLOCK)}
    _norm((x.dtype, x.dtype), sizes, tensors, 4 * x.numel(), epsilon=epsilon)
