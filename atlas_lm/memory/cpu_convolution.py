"""Short causal convolution, heads and unit norms on a CPU, as compiled code: one pass over memory each way."""

# B batch, H heads, T tokens, D head dim, W taps

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory import compiled

_SIZES = ("B", "T", "H", "D", "taps", "block")
_TENSORS: tuple[compiled.Field, ...] = (
    "x", "tail", "weight", ("out", 3), "norms", ("dout", 3), "dx", "dtail", "dweight",
)  # fmt: skip
_Arguments = compiled.structure(_SIZES, (), _TENSORS)

BLOCK = 256  # tokens of a piece of work


def can_run(x: Tensor) -> bool:
    """Whether the device and the precision are known, and the library could be built."""
    kind = (torch.promote_types(x.dtype, torch.float32), x.dtype)
    return x.device.type == "cpu" and kind in compiled.KINDS and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def heads(x_BTM: Tensor, tail_BWM: Tensor, weight_WM: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve (B, T, 3·H·D) with the W − 1 inputs before it: q, k of unit norm and v, each (B, H, T, D)."""
    return _Heads.apply(x_BTM, tail_BWM.to(x_BTM.dtype), weight_WM, count)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, count: int) -> Any:
        x, tail = x.contiguous(), tail.contiguous()
        wide = weight.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        B, T, M = x.shape
        D = M // 3 // count
        out = [x.new_empty(B, count, T, D) for _ in range(3)]
        norms = wide.new_empty(B, count, 2, T)
        arguments = _Arguments(B=B, T=T, H=count, D=D, taps=weight.size(0), block=BLOCK)
        _call(arguments, wide, {"x": x, "tail": tail, "weight": wide, "out": out, "norms": norms})
        ctx.save_for_backward(x, tail, wide, norms, *out)
        ctx.count, ctx.like = count, weight.dtype
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> Any:
        x, tail, wide, norms, *out = ctx.saved_tensors
        B, T, M = x.shape
        arguments = _Arguments(B=B, T=T, H=ctx.count, D=M // 3 // ctx.count, taps=wide.size(0), block=BLOCK)
        dx, dtail = torch.empty_like(x), torch.empty_like(tail)
        dweight = wide.new_empty(B * -(-T // BLOCK), *wide.shape)
        tensors: dict[str, Any] = {"x": x, "tail": tail, "weight": wide, "out": out, "norms": norms}
        tensors |= {"dout": [d.to(x.dtype).contiguous() for d in douts], "dx": dx, "dtail": dtail, "dweight": dweight}
        _call(arguments, wide, tensors)
        return dx, dtail, dweight.sum(0).to(ctx.like), None


def _call(arguments: Any, wide: Tensor, tensors: dict[str, Any]) -> None:
    compiled.point(arguments, _TENSORS, tensors)
    name = "convolution_" + compiled.KINDS[wide.dtype, tensors["x"].dtype]
    compiled.call(name, arguments, tensors["x"].numel() * arguments.taps)
