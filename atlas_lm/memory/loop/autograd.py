"""The loop over chunks as one autograd function (M7).

Autograd through the loop would run some hundreds of small operations a chunk, and keep their results and the fast
weights of every chunk. Here a chunk keeps its factors, and the fast weights are kept every few chunks: the backward
pass computes those between again. All that is kept is autograd's to keep: activation checkpointing lets go of it. A
graph serves one backward pass. No second derivatives.
"""

# G batch × heads, K chunks, C chunk, D head dim

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory import coefficients
from atlas_lm.memory.coefficients import Decays
from atlas_lm.memory.host_reads import simulated
from atlas_lm.memory.kernels.compiled import once_differentiable
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.loop import triton as triton_loop
from atlas_lm.memory.loop.backward import gradients
from atlas_lm.memory.loop.forward import learn_and_read, update
from atlas_lm.memory.loop.trial import agrees
from atlas_lm.memory.loop.types import ChunkBatch, LoopConfig, LoopInputs, flattened, restored, serve_once
from atlas_lm.memory.network import Weights
from atlas_lm.memory.state import without_autocast


def run(
    config: LoopConfig, states: list[Tensor] | None, initial: Weights, chunks: ChunkBatch
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (G, K·C, D) of every query and the states after the last complete chunk; a state is z, (G, 2R, Q).

    `initial` is W_init (H, R, Q) per layer. Without states the memory is empty, and none are given back.
    """
    if cpu_loop.can_run(config, chunks):
        return cpu_loop.run(config, states, initial, chunks)
    inputs = _inputs(config, initial, chunks)
    G, wide = chunks.phi.size(0), chunks.decay.dtype
    given = states or [w.new_zeros(G, 2 * w.size(1), w.size(2), dtype=wide) for w in initial]
    if triton_loop.can_run(config, inputs) and (
        simulated() or agrees(triton_loop.run, _in_pytorch, config, inputs, triton_loop.variant(config, inputs))
    ):
        y, after = triton_loop.run(config, given, inputs)
    else:
        y, after = _in_pytorch(config, given, inputs)
    return y, after if states else []


def _in_pytorch(config: LoopConfig, given: list[Tensor], inputs: LoopInputs) -> tuple[Tensor, list[Tensor]]:
    """As `run`, by PyTorch's operations; `given` are the states before."""
    y, *after = _Loop.apply(config, len(given), *given, *inputs)
    return y, after


def _inputs(config: LoopConfig, initial: Weights, chunks: ChunkBatch) -> LoopInputs:
    """What does not depend on the fast weights is computed for all chunks at once."""
    low, wide = chunks.phi.dtype, chunks.decay.dtype
    scores = read_coef = grad_coef = None
    if chunks.token_eta is not None:
        with without_autocast(chunks.phi):  # products of gates stay wide
            gates = Decays(chunks.token_eta, chunks.intake, chunks.retain, chunks.carry)
            reads = coefficients.reads(gates, chunks.gamma, config.context, chunks.same_segment)
            read_coef, grad_coef = torch.stack([reads.weights, -reads.momentum], dim=-2), reads.gradients
            scores = chunks.phi_q @ chunks.phi.mT
    known = chunks._asdict()
    return LoopInputs(
        **{name: known[name] for name in LoopInputs._fields if name in known and name != "gamma"},
        gamma=chunks.gamma.detach(),
        scores=scores,
        read_coef=read_coef,
        grad_coef=grad_coef,
        initial_out=None if len(initial) == 1 else _of_sequences(initial[1], chunks.phi.size(0)).to(wide),
        by_initial=_times_initial(chunks.phi, initial[0].to(low)),
        q_by_initial=_times_initial(chunks.phi_q, initial[0].to(low)),
    )


def _times_initial(x_GKNF: Tensor, w_HFP: Tensor) -> Tensor:
    """x W_init, head by head, over all sequences and chunks at once."""
    x = x_GKNF.unflatten(0, (-1, w_HFP.size(0)))
    y = x.transpose(0, 1).flatten(1, 3) @ w_HFP
    return y.unflatten(1, (x.size(0), *x_GKNF.shape[1:3])).transpose(0, 1).flatten(0, 1)


def _of_sequences(w: Tensor, count: int) -> Tensor:
    """(H, R, Q) → (G, R, Q)."""
    return w.repeat(count // w.size(0), 1, 1)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, config: LoopConfig, layers: int, *tensors: Tensor) -> Any:
        states, x = list(tensors[:layers]), LoopInputs(*tensors[layers:])
        K = x.phi.size(1)
        stride = math.isqrt(K - 1) + 1  # √K states are kept, and √K more live while those between are computed again
        outputs, records, kept = [], [], []
        with without_autocast(x.phi):
            for n in range(K):
                if n % stride == 0:
                    kept += states
                y, record = learn_and_read(config, x, n, states)
                if n < config.complete:
                    states, scales = update(config, x, n, states, record)
                    record = record._replace(scales=scales)
                outputs.append(y)
                if config.train:
                    records.append(record)
        if config.train:
            factors, ctx.places = flattened(records)
            ctx.config, ctx.layers, ctx.stride, ctx.kept = config, layers, stride, len(kept)
            ctx.save_for_backward(*tensors, *kept, *factors)
        if config.complete == 0:  # an input that is returned as it is would count as a view of itself
            states = [z.clone() for z in states]
        return (torch.stack(outputs, dim=1).flatten(1, 2), *states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *dafter: Tensor) -> Any:
        serve_once(ctx)
        config, layers, stride = ctx.config, ctx.layers, ctx.stride
        saved, count = ctx.saved_tensors, layers + len(LoopInputs._fields)  # read once: see cpu.py
        x, kept = LoopInputs(*saved[layers:count]), saved[count : count + ctx.kept]
        records: list[Any] = restored(saved[count + ctx.kept :], ctx.places)
        del saved
        K, C = x.phi.size(1), x.phi_q.size(2)
        dy = dy.to(config.operands).unflatten(1, (K, C))
        dstates = [dz.clone(memory_format=torch.contiguous_format) for dz in dafter]
        dinitial = None if x.initial_out is None else torch.zeros_like(x.initial_out)
        chunks: list[dict[str, Tensor]] = [{} for _ in range(K)]
        with without_autocast(x.phi):
            for start in range((K - 1) // stride * stride, -1, -stride):
                first = start // stride * layers
                states = [list(kept[first : first + layers])]
                end = min(start + stride, K)
                for n in range(start, min(end, config.complete)):
                    if n + 1 < end or records[n].scales:  # what the ball has held is looked at once more
                        states.append(update(config, x, n, states[-1], records[n])[0])
                for n in range(end - 1, start - 1, -1):
                    after = states.pop() if len(states) > n - start + 1 else None
                    dstates, chunks[n] = gradients(
                        config, x, n, states[-1], after, records[n], dy[:, n], dstates, dinitial
                    )
                    records[n] = None
        grads = (dinitial if name == "initial_out" else _stack(chunks, name) for name in LoopInputs._fields)
        return (None, None, *dstates, *grads)


def _stack(chunks: list[dict[str, Tensor]], name: str) -> Tensor | None:
    parts = [chunk.pop(name, None) for chunk in chunks]
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts], dim=1)
