"""The gated delta rule on a CPU, as compiled code: a core takes one (batch, head) after another and keeps its fast
weights in the cache.
"""

# G batch × heads, T tokens, D key dim, E value dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels.compiled import WIDE, Field, Function, once_differentiable, plain

_KEYS, _VALUES, _GATE, _STATE = ("G", "T", "F"), ("G", "T", "E"), ("G", "T"), ("G", "F", "E")
_delta = Function(
    "delta",
    ("G", "H", "T", "F", "E", "C"),
    (),
    (
        Field("q", _KEYS),
        Field("k", _KEYS),
        Field("v", _VALUES),
        Field("alpha", _GATE, WIDE),
        Field("beta", _GATE, WIDE),
        Field("initial", ("H", "F", "E"), WIDE),
        Field("before", _STATE, WIDE),
        Field("y", _VALUES, WIDE),
        Field("after", _STATE, WIDE),
        Field("kept", ("G", "chunks", "F", "E"), WIDE),
        Field("u", _VALUES, WIDE),
        Field("dy", _VALUES, WIDE),
        Field("dafter", _STATE, WIDE),
        Field("dq", _KEYS),
        Field("dk", _KEYS),
        Field("dv", _VALUES),
        Field("dalpha", _GATE, WIDE),
        Field("dbeta", _GATE, WIDE),
        Field("dinitial", _STATE, WIDE),
        Field("dbefore", _STATE, WIDE),
    ),
)
_GRADIENTS = ("q", "k", "v", "alpha", "beta", "before")


def can_run(v: Tensor, low: torch.dtype) -> bool:
    """Whether the device and the precision are known, and the library could be built."""
    kind = (torch.promote_types(v.dtype, torch.float32), low)
    return v.device.type == "cpu" and kind in compiled.KINDS and v.numel() > 0 and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def scan(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTE: Tensor,
    alpha_BHT: Tensor,
    beta_BHT: Tensor,
    state_BHDE: Tensor,
    initial_HDE: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """As `gated_delta.scan`. q, k and v in the precision of the products, all else in at least float32."""
    flat = (x.flatten(0, 1) for x in (q_BHTD, k_BHTD, v_BHTE, alpha_BHT, beta_BHT, state_BHDE))
    y, after = _Scan.apply(min(chunk, v_BHTE.size(2)), v_BHTE.size(1), torch.is_grad_enabled(), initial_HDE, *flat)
    return y.unflatten(0, v_BHTE.shape[:2]), after.unflatten(0, v_BHTE.shape[:2])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: int, heads: int, train: bool, initial: Tensor | None, *tensors: Tensor) -> Any:
        q, k, v, alpha, beta, before = (plain(x) for x in tensors)
        initial = None if initial is None else plain(initial)
        y, after = before.new_empty(v.shape), torch.empty_like(before)
        kept = {}
        if train:
            chunks = -(-v.size(1) // chunk)
            kept = {
                "kept": before.new_empty(before.size(0), chunks, *before.shape[1:]),
                "u": before.new_empty(v.shape),
            }
        given = {"q": q, "k": k, "v": v, "alpha": alpha, "beta": beta, "initial": initial}
        _call(chunk, heads, {**given, **kept, "before": before, "y": y, "after": after})
        ctx.save_for_backward(*given.values(), *kept.values())
        ctx.chunk, ctx.heads = chunk, heads
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dafter: Tensor) -> Any:
        q, k, v, alpha, beta, initial, kept, u = ctx.saved_tensors
        given = {"q": q, "k": k, "v": v, "alpha": alpha, "beta": beta, "initial": initial, "kept": kept, "u": u}
        dafter = plain(dafter)
        found = {f"d{name}": torch.empty_like(given[name]) for name in _GRADIENTS if name != "before"}
        found["dbefore"] = torch.empty_like(dafter)
        if initial is not None:
            found["dinitial"] = torch.empty_like(dafter)
        _call(ctx.chunk, ctx.heads, {**given, "dy": plain(dy), "dafter": dafter, **found})
        dinitial = None if initial is None else found["dinitial"].unflatten(0, (-1, ctx.heads)).sum(0)
        return None, None, None, dinitial, *(found[f"d{name}"] for name in _GRADIENTS)


def _call(chunk: int, heads: int, tensors: dict[str, Any]) -> None:
    k, v, wide = tensors["k"], tensors["v"], tensors["alpha"].dtype
    (G, T, F), E = k.shape, v.size(2)
    sizes = {"G": G, "H": heads, "T": T, "F": F, "E": E, "C": chunk, "chunks": -(-T // chunk)}
    _delta((wide, v.dtype), sizes, tensors, G * T * F * (E + chunk))
