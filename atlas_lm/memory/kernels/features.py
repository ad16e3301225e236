"""The sketch feature map on a CPU, as compiled code after its two linear maps: one pass over memory each way."""

# D head dim, R rank; … any leading axes

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels.compiled import WIDE, Field, Function, once_differentiable, plain

_sketch = Function(
    "sketch",
    ("rows", "D", "R", "block"),
    ("constant", "linear", "quadratic"),
    (
        Field("x", ("rows", "D")),
        Field("ab", ("rows", "2*R")),
        Field("phi", ("rows", "F")),
        Field("norms", ("rows",), WIDE),
        Field("dphi", ("rows", "F")),
        Field("dx", ("rows", "D")),
        Field("dab", ("rows", "2*R")),
    ),
)

BLOCK = 256  # tokens of a piece of work


def can_run(x: Tensor, ab: Tensor) -> bool:
    """Whether the device and the precisions are known, and the library could be built."""
    kind = (torch.promote_types(x.dtype, torch.float32), x.dtype)
    known = x.device.type == "cpu" and x.dtype == ab.dtype and kind in compiled.KINDS
    return known and x.numel() > 0 and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def sketch(x: Tensor, ab: Tensor, scales: tuple[float, float, float]) -> Tensor:
    """[c₀, c₁ x, c₂ p / ‖p‖] with p = a ⊙ b: (…, D), (…, 2R) → (…, 1+D+R)."""
    phi = _Sketch.apply(x.flatten(0, -2), ab.flatten(0, -2), scales)
    return phi.unflatten(0, x.shape[:-1])


class _Sketch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ab: Tensor, scales: tuple[float, float, float]) -> Tensor:
        x, ab = plain(x), plain(ab)
        phi = x.new_empty(x.size(0), 1 + x.size(1) + ab.size(1) // 2)
        norms = x.new_empty(x.size(0), dtype=torch.promote_types(x.dtype, torch.float32))
        _call(scales, {"x": x, "ab": ab, "phi": phi, "norms": norms})
        ctx.save_for_backward(x, ab, norms)
        ctx.scales = scales
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dphi: Tensor) -> Any:
        x, ab, norms = ctx.saved_tensors
        dx, dab = torch.empty_like(x), torch.empty_like(ab)
        dphi = plain(dphi.to(x.dtype))
        _call(ctx.scales, {"x": x, "ab": ab, "norms": norms, "dphi": dphi, "dx": dx, "dab": dab})
        return dx, dab, None


def _call(scales: tuple[float, float, float], tensors: dict[str, Any]) -> None:
    x, ab, norms = tensors["x"], tensors["ab"], tensors["norms"]
    D, R = x.size(1), ab.size(1) // 2
    sizes = {"rows": x.size(0), "D": D, "R": R, "F": 1 + D + R, "block": BLOCK}
    constant, linear, quadratic = scales
    kind = (norms.dtype, x.dtype)
    _sketch(kind, sizes, tensors, 4 * ab.numel(), constant=constant, linear=linear, quadratic=quadratic)
