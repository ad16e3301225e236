"""The loop over chunks on a CPU, as compiled code: a core takes one (batch, head) after another and keeps its fast
weights in the cache. What it computes is that of `autograd.py`, to rounding.
"""

# G batch × heads, K chunks, C chunk, N = C + halo tokens of a block, F feature dim, P pre-activations, E hidden dim,
# D outputs; of layer l: R rows (F or E), Q columns (P or D)

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory import network as net
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels.compiled import FLAG, WIDE, Field, Function, once_differentiable, plain
from atlas_lm.memory.loop.types import ChunkBatch, LoopConfig, serve_once
from atlas_lm.memory.network import Weights

# Fast weights are kept at every so many chunks at the most often: to compute those between again takes no longer than
# to fetch them from memory.
STATES = 64  # fast weights that are kept for the backward pass, at most; those between are computed again
STRIDE = 4

_STATE = ("G", "2*F", "P"), ("G", "2*E", "D")
_GATE = ("G", "K", "C")


def _per_layer(name: str, of: tuple[tuple[str, ...], tuple[str, ...]]) -> Field:
    return Field(name, of[0], WIDE, more=of[1:], used="layers")


_loop = Function(
    "loop",
    ("G", "H", "K", "C", "N", "F", "P", "E", "D", "kind", "token", "complete", "stride", "context", "train", "steps"),
    ("radius", "smallest"),
    (
        _per_layer("initial", (("H", "F", "P"), ("H", "E", "D"))),
        Field("phi", ("G", "K", "N", "F")),
        Field("v", ("G", "K", "N", "D")),
        Field("phi_q", ("G", "K", "C", "F")),
        Field("gamma", ("G", "K", "N"), WIDE),
        Field("same_segment", ("G", "K", "N", "N"), FLAG),
        Field("in_start_segment", ("G", "K", "N", "1"), FLAG),
        Field("decay", ("G", "K", "2", "2"), WIDE),
        Field("eta", ("G", "K"), WIDE),
        Field("write_coef", ("G", "K", "2", "N"), WIDE),
        Field("gates", _GATE, WIDE, more=(_GATE,) * 3),
        _per_layer("before", _STATE),
        Field("y", ("G", "K*C", "D")),
        _per_layer("after", _STATE),
        _per_layer("kept", (("kept", *_STATE[0]), ("kept", *_STATE[1]))),
        Field("pre", ("G", "K", "N", "padded_P"), WIDE),
        Field("read_pre", ("G", "K", "C", "padded_P"), WIDE),
        Field("error", ("G", "K", "N", "padded_D"), WIDE),
        Field("back", ("G", "K", "N", "padded_E"), WIDE),
        Field("total", ("G", "K", "reads", "N"), WIDE),
        Field("scale", ("G", "K", "3"), WIDE),
        Field("dy", ("G", "K*C", "D")),
        _per_layer("dstate", _STATE),
        _per_layer("dinitial", (("G", "F", "P"), ("G", "E", "D"))),
        Field("dphi", ("G", "K", "N", "F")),
        Field("dv", ("G", "K", "N", "D")),
        Field("dphi_q", ("G", "K", "C", "F")),
        Field("dgamma", ("G", "K", "N"), WIDE),
        Field("ddecay", ("G", "K", "2", "2"), WIDE),
        Field("deta", ("G", "K"), WIDE),
        Field("dwrite_coef", ("G", "K", "2", "N"), WIDE),
        Field("dgates", _GATE, WIDE, more=(_GATE,) * 3),
    ),
)
_GATES = ("token_eta", "intake", "retain", "carry")


def can_run(config: LoopConfig, chunks: ChunkBatch) -> bool:
    """Whether the compiled loop knows this rule, device and precision, and could be built here."""
    if chunks.phi.device.type != "cpu":
        return False
    return (chunks.decay.dtype, config.operands) in compiled.KINDS and compiled.library() is not None


@torch.compiler.disable  # it calls into a library with addresses
def run(
    config: LoopConfig, states: list[Tensor] | None, initial: Weights, chunks: ChunkBatch
) -> tuple[Tensor, list[Tensor]]:
    """As `loop.run`."""
    given = states or []
    y, *after = _CompiledLoop.apply(config, len(initial), len(given), *initial, *given, *chunks)
    return y, after


class _CompiledLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, config: LoopConfig, layers: int, states: int, *tensors: Tensor | None) -> Any:
        given: list[Any] = [None if x is None else plain(x) for x in tensors]
        x = ChunkBatch(*given[layers + states :])
        initial: list[Any] = [w.to(x.decay.dtype) for w in given[:layers] if w is not None]
        before: list[Any] = given[layers : layers + states]
        sizes = _sizes(config, x, initial)
        after = [torch.empty_like(z) for z in before]
        G, K, C, N = (sizes[name] for name in "GKCN")
        y = x.phi.new_empty(G, K * C, sizes["D"])
        records: dict[str, Any] = {}
        if config.train:
            wide = x.decay.new_empty
            records = {
                "kept": [wide(sizes["kept"], G, 2 * w.size(1), w.size(2)) for w in initial],
                "pre": wide(G, K, N, sizes["padded_P"]),
                "total": wide(G, K, sizes["reads"], N),
                "scale": wide(G, K, 3),
            }
            if sizes["kind"]:
                records |= {
                    "read_pre": wide(G, K, C, sizes["padded_P"]),
                    "error": wide(G, K, N, sizes["padded_D"]),
                    "back": wide(G, K, N, sizes["padded_E"]),
                }
        states_in_out = {"before": before, "after": after} if states else {}
        _call(config, sizes, x, x._asdict() | records | states_in_out | {"y": y, "initial": initial})
        if config.train:
            ctx.config, ctx.layers = config, layers
            ctx.places = {name: len(value) if isinstance(value, list) else None for name, value in records.items()}
            factors = [y for value in records.values() for y in (value if isinstance(value, list) else [value])]
            ctx.save_for_backward(*initial, *x, *factors)
        return (y, *after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *dafter: Tensor) -> Any:
        serve_once(ctx)
        saved = ctx.saved_tensors  # read once: activation checkpointing gives each tensor a single time
        count = ctx.layers + len(ChunkBatch._fields)
        initial, x, rest = saved[: ctx.layers], ChunkBatch(*saved[ctx.layers : count]), iter(saved[count:])
        records: dict[str, Any] = {
            name: next(rest) if many is None else [next(rest) for _ in range(many)] for name, many in ctx.places.items()
        }
        sizes = _sizes(ctx.config, x, initial)
        G, H = sizes["G"], sizes["H"]
        dstate = [dz.clone(memory_format=torch.contiguous_format) for dz in dafter]
        dinitial = [w.new_empty(G, *w.shape[1:]) for w in initial]
        grads: dict[str, Any] = {}
        written = ("phi", "v", "phi_q", "decay", "write_coef", *(("eta",) if sizes["steps"] else ()))
        for name in (*written, *(("gamma", *_GATES) if sizes["token"] else ())):
            like = getattr(x, name)
            empty = torch.zeros_like if name == "decay" else torch.empty_like  # its products are summed
            grads[name] = None if like is None else empty(like)
        outputs: dict[str, Any] = {f"d{name}": grad for name, grad in grads.items()}
        outputs |= {"dstate": dstate or None, "dinitial": dinitial}  # none where the memory was empty
        given = {"dy": plain(dy.to(ctx.config.operands)), "initial": initial}
        if sizes["token"]:
            outputs["dgates"] = [grads[name] for name in _GATES]
        _call(ctx.config, sizes, x, x._asdict() | records | given | outputs)
        of_heads = (dw.view(G // H, H, *dw.shape[1:]).sum(0) for dw in dinitial)
        return (None, None, None, *of_heads, *dstate, *(grads.get(name) for name in ChunkBatch._fields))


def _sizes(config: LoopConfig, x: ChunkBatch, initial: Sequence[Tensor]) -> dict[str, int]:
    """All sizes that shapes are checked against, by the names of `_loop`."""
    G, K, N, F = x.phi.shape
    H, C, D = initial[0].size(0), x.phi_q.size(2), x.v.size(-1)
    act = config.network.activation
    E = F if act is None else initial[-1].size(1)
    P = D if act is None else act.width * E
    if len(initial) != (1 if act is None else 2) or H < 1 or G % H:
        raise ValueError(f"the network {config.network.kind} cannot run with {len(initial)} matrices, {H} of {G} heads")
    stride, token = max(-(-K // STATES), min(K, STRIDE)), x.token_eta is not None
    padded = functools.partial(compiled.leading_dimension, x.decay.element_size())
    return {
        "G": G, "H": H, "K": K, "C": C, "N": N, "F": F, "P": P, "E": E, "D": D,
        "kind": 0 if act is None else act.width, "token": token, "complete": config.complete, "stride": stride,
        "context": config.context, "train": config.train,
        "steps": config.newton_schulz_steps if config.update == "newton_schulz" else 0,
        "layers": len(initial), "kept": -(-K // max(1, stride)), "reads": C if token else 1,
        "padded_P": padded(P), "padded_E": padded(E), "padded_D": padded(D),
    }  # fmt: skip


def _call(config: LoopConfig, sizes: dict[str, int], x: ChunkBatch, tensors: dict[str, Any]) -> None:
    if sizes["token"]:
        tensors = tensors | {"gates": [getattr(x, name) for name in _GATES]}
    G, K, N, F, P, E, D = (sizes[name] for name in "GKNFPED")
    kind = (x.decay.dtype, config.operands)
    work = G * K * N * (F * P + E * D)
    _loop(kind, sizes, tensors, work, radius=config.radius, smallest=net.SMALLEST_CURVATURE)
