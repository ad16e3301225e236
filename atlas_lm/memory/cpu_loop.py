"""The loop over chunks on a CPU, as compiled code: a core takes one (batch, head) after another and keeps its fast
weights in the cache. What it computes is `loop.py`'s, to rounding.
"""

# G batch × heads, K chunks, C chunk, N = C + halo tokens of a block, F feature dim, P pre-activations, E hidden dim,
# D outputs; of layer l: R rows (F or E), Q columns (P or D)

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory import compiled
from atlas_lm.memory import network as net
from atlas_lm.memory.chunk_step import STATES, Chunks, Plan, check_backward
from atlas_lm.memory.network import Weights

# Fast weights are kept at every so many chunks at the most often: to compute those between again takes no longer than
# to fetch them from memory.
STRIDE = 4

_SIZES = (
    "G",
    "H",
    "K",
    "C",
    "N",
    "F",
    "P",
    "E",
    "D",
    "kind",
    "token",
    "complete",
    "stride",
    "context",
    "train",
    "steps",
)
_TENSORS: tuple[compiled.Field, ...] = (
    ("initial", 2), "phi", "v", "phi_q", "gamma", "same", "old", "decay", "eta", "on", ("gates", 4), ("before", 2),
    "y", ("after", 2), ("kept", 2), "pre", "read_pre", "error", "back", "total", "scale",
    "dy", ("dstate", 2), ("dinitial", 2), "dphi", "dv", "dphi_q", "dgamma", "ddecay", "deta", "don", ("dgates", 4),
)  # fmt: skip
_GATES = ("token_eta", "intake", "retain", "carry")
_Arguments = compiled.structure(_SIZES, ("radius", "smallest"), _TENSORS)


def can_run(plan: Plan, chunks: Chunks) -> bool:
    """Whether the compiled loop knows this rule, device and precision, and could be built here."""
    if chunks.phi.device.type != "cpu":
        return False
    return (chunks.decay.dtype, plan.operands) in compiled.KINDS and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def run(plan: Plan, states: list[Tensor] | None, initial: Weights, chunks: Chunks) -> tuple[Tensor, list[Tensor]]:
    """As `loop.run`."""
    given = states or []
    y, *after = _CompiledLoop.apply(plan, len(initial), len(given), *initial, *given, *chunks)
    return y, after


class _CompiledLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, layers: int, states: int, *tensors: Tensor | None) -> Any:
        given: list[Any] = [None if x is None else x.contiguous() for x in tensors]
        x = Chunks(*given[layers + states :])
        initial: list[Any] = [w.to(x.decay.dtype) for w in given[:layers] if w is not None]
        before: list[Any] = given[layers : layers + states]
        arguments = _arguments(plan, x, initial)
        after = [torch.empty_like(z) for z in before]
        G, K, C, N = arguments.G, arguments.K, arguments.C, arguments.N
        y = x.phi.new_empty(G, K * C, arguments.D)
        records: dict[str, Any] = {}
        if plan.train:
            wide, P, E, D = x.decay.new_empty, arguments.P, arguments.E, arguments.D
            padded = functools.partial(compiled.leading_dimension, x.decay.element_size())
            records = {
                "kept": [wide(-(-K // arguments.stride), G, 2 * w.size(1), w.size(2)) for w in initial],
                "pre": wide(G, K, N, padded(P)),
                "total": wide(G, K, C if arguments.token else 1, N),
                "scale": wide(G, K, 3),
            }
            if arguments.kind:
                records |= {
                    "read_pre": wide(G, K, C, padded(P)),
                    "error": wide(G, K, N, padded(D)),
                    "back": wide(G, K, N, padded(E)),
                }
        given_back = {"y": y, "before": before, "after": after, "initial": initial}
        _call(plan, arguments, x, x._asdict() | records | given_back)
        if plan.train:
            ctx.plan, ctx.layers, ctx.records = plan, layers, records
            ctx.save_for_backward(*initial, *x)
        return (y, *after)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dafter: Tensor) -> Any:
        check_backward(gone=ctx.records is None)
        records, ctx.records = ctx.records, None
        initial, x = ctx.saved_tensors[: ctx.layers], Chunks(*ctx.saved_tensors[ctx.layers :])
        arguments = _arguments(ctx.plan, x, initial)
        G, H = arguments.G, arguments.H
        dstate = [dz.clone(memory_format=torch.contiguous_format) for dz in dafter]
        dinitial = [w.new_empty(G, *w.shape[1:]) for w in initial]
        grads: dict[str, Tensor | None] = {}
        written = ("phi", "v", "phi_q", "decay", "on", *(("eta",) if arguments.steps else ()))
        for name in (*written, *(("gamma", *_GATES) if arguments.token else ())):
            like = getattr(x, name)
            empty = torch.zeros_like if name == "decay" else torch.empty_like  # its products are summed
            grads[name] = None if like is None else empty(like)
        outputs = {f"d{name}": grad for name, grad in grads.items()} | {"dstate": dstate, "dinitial": dinitial}
        given = {"dy": dy.to(ctx.plan.operands).contiguous(), "initial": initial}
        if arguments.token:
            outputs["dgates"] = [grads[name] for name in _GATES]
        _call(ctx.plan, arguments, x, x._asdict() | records | given | outputs)
        of_heads = (dw.view(G // H, H, *dw.shape[1:]).sum(0) for dw in dinitial)
        return (None, None, None, *of_heads, *dstate, *(grads.get(name) for name in Chunks._fields))


def _arguments(plan: Plan, x: Chunks, initial: Sequence[Tensor]) -> Any:
    G, K, N, F = x.phi.shape
    act = plan.network.activation
    return _Arguments(
        G=G, H=initial[0].size(0), K=K, C=x.phi_q.size(2), N=N, F=F, P=initial[0].size(2), E=initial[-1].size(1),
        D=x.v.size(-1), kind=0 if act is None else act.width, token=x.token_eta is not None, complete=plan.complete,
        stride=max(-(-K // STATES), min(K, STRIDE)), context=plan.context, train=plan.train,
        steps=plan.newton_schulz_steps if plan.update == "newton_schulz" else 0, radius=plan.radius,
        smallest=net.SMALLEST_CURVATURE,
    )  # fmt: skip


def _call(plan: Plan, arguments: Any, x: Chunks, tensors: dict[str, Any]) -> None:
    if arguments.token:
        tensors = tensors | {"gates": [getattr(x, name) for name in _GATES]}
    compiled.point(arguments, _TENSORS, tensors)
    work = arguments.G * arguments.K * arguments.N * (arguments.F * arguments.P + arguments.E * arguments.D)
    compiled.call("loop_" + compiled.KINDS[x.decay.dtype, plan.operands], arguments, work)
