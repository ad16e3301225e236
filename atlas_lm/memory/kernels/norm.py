"""Root-mean-square norm on a CPU, as compiled code: one pass over memory each way, heads merged after it."""

# B batch, H heads, T tokens, D channels of a head

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


@torch.compiler.disable  # it calls into a library with addresses
def normalise(x_BHTD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Every head over its root mean square: (B, H, T, D) → (B, T, H·D). Only where `can_run` says so."""
    return _Norm.apply(x_BHTD, weight_D, epsilon)


def can_run(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled code takes these: on a CPU, of one dtype that it knows, and not empty."""
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
