"""Sliding-window attention on a CPU, as compiled code: from the projection's output to merged heads and back."""

# B batch, H heads, T tokens, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels.compiled import WIDE, Field, Function, once_differentiable, plain

_attention = Function(
    "attention",
    ("B", "H", "T", "D", "window", "block"),
    ("scale",),
    (
        Field("qkv", ("B", "T", "3*H*D")),
        Field("cos", ("T", "half"), WIDE),
        Field("sin", ("T", "half"), WIDE),
        Field("y", ("B", "T", "H*D")),
        Field("sums", ("B", "H", "T"), WIDE),
        Field("dy", ("B", "T", "H*D")),
        Field("dqkv", ("B", "T", "3*H*D")),
    ),
)

BLOCK = 64  # queries at a time


def can_run(qkv: Tensor) -> bool:
    """Whether the device and the precision are known, and the library could be built."""
    kind = (torch.promote_types(qkv.dtype, torch.float32), qkv.dtype)
    return qkv.device.type == "cpu" and kind in compiled.KINDS and qkv.numel() > 0 and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def window_attention(qkv_BTM: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int, window: int) -> Tensor:
    """Every token attends to itself and the `window` − 1 before it: (B, T, 3·H·D) → (B, T, H·D).

    Queries and keys are turned by the angles whose cosines and sines (T, D/2) are given, in at least float32.
    ValueError for sizes that do not fit each other.
    """
    return _WindowAttention.apply(qkv_BTM, cos_TD, sin_TD, heads, window)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, window: int) -> Tensor:
        qkv, cos, sin = plain(qkv), plain(cos), plain(sin)
        B, T, M = qkv.shape
        y, sums = qkv.new_empty(B, T, M // 3), cos.new_empty(B, heads, T)
        _call(heads, window, {"qkv": qkv, "cos": cos, "sin": sin, "y": y, "sums": sums})
        ctx.save_for_backward(qkv, cos, sin, y, sums)
        ctx.heads, ctx.window = heads, window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        qkv, cos, sin, y, sums = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        known = {"qkv": qkv, "cos": cos, "sin": sin, "y": y, "sums": sums}
        _call(ctx.heads, ctx.window, {**known, "dy": plain(dy.to(qkv.dtype)), "dqkv": dqkv})
        return dqkv, None, None, None, None


def _call(heads: int, window: int, tensors: dict[str, Tensor]) -> None:
    qkv = tensors["qkv"]
    B, T, M = qkv.shape
    D = M // 3 // heads
    if window < 1 or D % 2:
        raise ValueError(f"window attention needs a window of at least 1 and an even head dim, got {window} and {D}")
    sizes = {"B": B, "H": heads, "T": T, "D": D, "window": window, "block": BLOCK, "half": D // 2}
    wide = torch.promote_types(qkv.dtype, torch.float32)
    _attention((wide, qkv.dtype), sizes, tensors, qkv.numel() * min(window, T), scale=D**-0.5)
