"""Short causal convolution, heads and unit norms on a CPU, as compiled code: one pass over memory each way."""

# B batch, H heads, T tokens, D head dim, W taps

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels.compiled import WIDE, Field, Function, once_differentiable, plain

_OUT = ("B", "H", "T", "D")
_convolution = Function(
    "convolution",
    ("B", "T", "H", "D", "taps", "block"),
    (),
    (
        Field("x", ("B", "T", "3*H*D")),
        Field("tail", ("B", "before", "3*H*D")),
        Field("weight", ("taps", "3*H*D"), WIDE),
        Field("out", _OUT, more=(_OUT, _OUT)),
        Field("norms", ("B", "H", "2", "T"), WIDE),
        Field("dout", _OUT, more=(_OUT, _OUT)),
        Field("dx", ("B", "T", "3*H*D")),
        Field("dtail", ("B", "before", "3*H*D")),
        Field("dweight", ("rows", "taps", "3*H*D"), WIDE),
    ),
)

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
    x, wide = tensors["x"], tensors["weight"]
    B, T, M = x.shape
    taps = wide.size(0)
    sizes = {"B": B, "T": T, "H": count, "D": M // 3 // count, "taps": taps, "block": BLOCK, "before": taps - 1}
    _convolution((wide.dtype, x.dtype), sizes | {"rows": _pieces(x)}, tensors, x.numel() * taps)
