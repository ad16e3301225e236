"""Short causal convolution on a CPU, with heads and unit norms or without, as compiled code: one pass over memory each
way.
"""

# B batch, H heads, T tokens, D head dim, W taps

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels.compiled import WIDE, Field, Function, once_differentiable, plain


def _function(channels: str, out: tuple[str, ...]) -> Function:
    return Function(
        "convolution",
        ("B", "T", "H", "D", "taps", "block"),
        (),
        (
            Field("x", ("B", "T", channels)),
            Field("tail", ("B", "before", channels)),
            Field("weight", ("taps", channels), WIDE),
            Field("out", out, more=(out, out)),
            Field("norms", ("B", "H", "2", "T"), WIDE),
            Field("dout", out, more=(out, out)),
            Field("dx", ("B", "T", channels)),
            Field("dtail", ("B", "before", channels)),
            Field("dweight", ("rows", "taps", channels), WIDE),
        ),
    )


_of_heads, _plain = _function("3*H*D", ("B", "H", "T", "D")), _function("D", ("B", "T", "D"))

BLOCK = 256  # tokens of a piece of work


def can_run(x: Tensor) -> bool:
    """Whether the device and the precision are known, and the library could be built."""
    kind = (torch.promote_types(x.dtype, torch.float32), x.dtype)
    return x.device.type == "cpu" and kind in compiled.KINDS and x.numel() > 0 and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def heads(x_BTM: Tensor, tail_BWM: Tensor, weight_WM: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve (B, T, 3·H·D) with the W − 1 inputs before it: q, k of unit norm and v, each (B, H, T, D).

    ValueError for sizes that do not fit each other.
    """
    return _Heads.apply(x_BTM, tail_BWM.to(x_BTM.dtype), weight_WM, count)


@torch.compiler.disable
def convolve(x_BTM: Tensor, tail_BWM: Tensor, weight_WM: Tensor) -> Tensor:
    """(B, T, M) with the W − 1 inputs before it → (B, T, M). ValueError as above."""
    return _Convolution.apply(x_BTM, tail_BWM.to(x_BTM.dtype), weight_WM)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        x, tail = plain(x), plain(tail)
        wide = plain(weight.to(torch.promote_types(x.dtype, torch.float32)))
        y = torch.empty_like(x)
        _call(0, {"x": x, "tail": tail, "weight": wide, "out": [y, None, None]})
        ctx.save_for_backward(x, tail, wide)
        ctx.like = weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, tail, wide = ctx.saved_tensors
        dx, dtail = torch.empty_like(x), torch.empty_like(tail)
        dweight = wide.new_empty(_pieces(x), *wide.shape)
        tensors = {"x": x, "tail": tail, "weight": wide, "dx": dx, "dtail": dtail, "dweight": dweight}
        _call(0, {**tensors, "dout": [plain(dy.to(x.dtype)), None, None]})
        return dx, dtail, dweight.sum(0).to(ctx.like)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, count: int) -> Any:
        x, tail = plain(x), plain(tail)
        wide = plain(weight.to(torch.promote_types(x.dtype, torch.float32)))
        B, T, M = x.shape
        out = [x.new_empty(B, count, T, M // 3 // count) for _ in range(3)]
        norms = wide.new_empty(B, count, 2, T)
        _call(count, {"x": x, "tail": tail, "weight": wide, "out": out, "norms": norms})
        ctx.save_for_backward(x, tail, wide, norms, *out)
        ctx.count, ctx.like = count, weight.dtype
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> Any:
        x, tail, wide, norms, *out = ctx.saved_tensors
        dx, dtail = torch.empty_like(x), torch.empty_like(tail)
        dweight = wide.new_empty(_pieces(x), *wide.shape)
        tensors: dict[str, Any] = {"x": x, "tail": tail, "weight": wide, "out": out, "norms": norms}
        tensors |= {"dout": [plain(d.to(x.dtype)) for d in douts], "dx": dx, "dtail": dtail, "dweight": dweight}
        _call(ctx.count, tensors)
        return dx, dtail, dweight.sum(0).to(ctx.like), None


def _pieces(x: Tensor) -> int:
    return x.size(0) * -(-x.size(1) // BLOCK)


def _call(count: int, tensors: dict[str, Any]) -> None:
    """`count` heads; 0: neither heads nor norms."""
    x, wide = tensors["x"], tensors["weight"]
    B, T, M = x.shape
    taps, D = wide.size(0), M // 3 // count if count else M
    sizes = {"B": B, "T": T, "H": max(1, count), "D": D, "taps": taps, "block": BLOCK, "before": taps - 1}
    function = _of_heads if count else _plain
    function((wide.dtype, x.dtype), sizes | {"rows": _pieces(x)}, tensors, x.numel() * taps)
