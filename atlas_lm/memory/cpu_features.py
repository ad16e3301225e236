"""The sketch feature map on a CPU, as compiled code behind its two linear maps: one pass over memory each way."""

# D head dim, R rank; … any leading axes

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory import compiled

_TENSORS: tuple[compiled.Field, ...] = ("x", "ab", "phi", "norms", "dphi", "dx", "dab")
_Arguments = compiled.structure(("rows", "D", "R", "block"), ("constant", "linear", "quadratic"), _TENSORS)

BLOCK = 256  # tokens of a piece of work


def can_run(x: Tensor, ab: Tensor) -> bool:
    """Whether the device and the precisions are known, and the library could be built."""
    kind = (torch.promote_types(x.dtype, torch.float32), x.dtype)
    return x.device.type == "cpu" and x.dtype == ab.dtype and kind in compiled.KINDS and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def sketch(x: Tensor, ab: Tensor, scales: tuple[float, float, float]) -> Tensor:
    """[c₀, c₁ x, c₂ p / ‖p‖] with p = a ⊙ b: (…, D), (…, 2R) → (…, 1+D+R)."""
    return _Sketch.apply(x, ab, scales)


class _Sketch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ab: Tensor, scales: tuple[float, float, float]) -> Tensor:
        x, ab = x.contiguous(), ab.contiguous()
        phi = x.new_empty(*x.shape[:-1], 1 + x.size(-1) + ab.size(-1) // 2)
        norms = torch.empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        _call(scales, {"x": x, "ab": ab, "phi": phi, "norms": norms})
        ctx.save_for_backward(x, ab, norms)
        ctx.scales = scales
        return phi

    @staticmethod
    def backward(ctx: Any, dphi: Tensor) -> Any:
        x, ab, norms = ctx.saved_tensors
        dx, dab = torch.empty_like(x), torch.empty_like(ab)
        dphi = dphi.to(x.dtype).contiguous()
        _call(ctx.scales, {"x": x, "ab": ab, "norms": norms, "dphi": dphi, "dx": dx, "dab": dab})
        return dx, dab, None


def _call(scales: tuple[float, float, float], tensors: dict[str, Any]) -> None:
    x, ab, norms = tensors["x"], tensors["ab"], tensors["norms"]
    arguments = _Arguments(
        rows=norms.numel(), D=x.size(-1), R=ab.size(-1) // 2, block=BLOCK,
        constant=scales[0], linear=scales[1], quadratic=scales[2],
    )  # fmt: skip
    compiled.point(arguments, _TENSORS, tensors)
    name = "sketch_" + compiled.KINDS[norms.dtype, x.dtype]
    compiled.call(name, arguments, 4 * ab.numel())
