"""The gradients of `forward.py`, in closed form; D has none.

`Totals` gathers what flows back through one chunk.
"""

# G batch × heads, K chunks, C chunk, N = C + halo tokens of a block, F feature dim, P pre-activations, E hidden dim
# of layer l: R rows (F or E), Q columns (P or D)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory import network as net
from atlas_lm.memory.loop.forward import (
    add_outer,
    along,
    half,
    masked,
    masks,
    mix,
    orthogonal,
    twice,
    update,
    write_weights,
)
from atlas_lm.memory.loop.types import LoopConfig, LoopInputs, Maybe, Record


class Totals:
    """Gradients on their way back through one chunk."""

    def __init__(self) -> None:
        self.inputs: list[Maybe] = [None, None]
        self.errors: list[Maybe] = [None, None]
        self.found: dict[str, Tensor] = {}


def gradients(
    config: LoopConfig, x: LoopInputs, n: int, states: list[Tensor], after: list[Tensor] | None, record: Record,
    dy: Tensor, dstates: list[Tensor], dinitial: Maybe,
) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """The gradients of the states before a chunk, given those of the states `after` it, and of its inputs.

    `after` is read where the ball has held them.
    """
    totals = Totals()
    if n < config.complete:
        if record.scales and after is not None:
            held = [half(z, 0) for z in after]
            dw = [half(dz, 0) for dz in dstates]
            dstates = _with_half(dstates, 0, tuple(map(net.shrink_backward, held, record.scales, dw)))
        dstates = _backward_update(config, x, n, states, record, dstates, totals)
    z = [state.to(config.operands) for state in states]
    w0 = None if x.initial_out is None else x.initial_out.to(config.operands)
    read = _backward_read(config, x, n, z, w0, record, dy, totals, dinitial)
    learned = None
    if totals.errors[0] is not None:
        learned = _backward_learn(config, x, n, z, w0, record, totals, dinitial)
    for l, dz in enumerate(dstates):
        _accumulate(dz, read[l], None if learned is None else learned[l])
    return dstates, totals.found


Outer = tuple[Tensor, Tensor]  # (G, N, R or 2R) and (G, N, Q): their product aᵀ b adds to the gradient of w or of z


def _accumulate(dz: Tensor, read: Outer, learned: list[Outer] | None) -> None:
    """Add all products of a chunk to the gradient of a state, in one pass."""
    parts = [read, *(learned or [])]
    R = dz.size(1)
    left = torch.cat([nnf.pad(a, (0, R - a.size(2))) for a, _ in parts], dim=1)
    add_outer(dz, left, torch.cat([b for _, b in parts], dim=1))


def _backward_update(
    config: LoopConfig,
    x: LoopInputs,
    n: int,
    states: list[Tensor],
    record: Record,
    dstates: list[Tensor],
    totals: Totals,
) -> list[Tensor]:
    if config.update == "newton_schulz":
        dstates = _backward_orthogonal(config, x, n, states, record, dstates, totals)
    write_coef, before = write_weights(x, n, record), []
    ddecay: Any = 0.0
    dwrite_coef: Any = 0.0
    for l, (z, dz, inputs, error) in enumerate(zip(states, dstates, record.inputs, record.errors, strict=True)):
        low = dz.to(error.dtype)
        totals.errors[l] = twice(inputs, write_coef) @ low
        left, right = (error @ low.mT).chunk(2, dim=-1)
        totals.inputs[l] = torch.addcmul(left * write_coef[:, 0], right, write_coef[:, 1])
        dwrite_coef = dwrite_coef + torch.stack([(inputs * left).sum(-1), (inputs * right).sum(-1)], dim=1).to(
            x.write_coef.dtype
        )
        ddecay = ddecay + along(dz, z)
        before.append(mix(x.decay[:, n].mT, dz))
    totals.found["write_coef"] = dwrite_coef if record.total is None else dwrite_coef / record.total[:, -1:]
    totals.found["decay"] = ddecay
    return before


def _with_half(states: list[Tensor], which: int, halves: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies of the states with one half replaced."""
    copies = [z.clone() for z in states]
    for z, new in zip(copies, halves, strict=True):
        half(z, which).copy_(new)
    return copies


def _backward_orthogonal(
    config: LoopConfig,
    x: LoopInputs,
    n: int,
    states: list[Tensor],
    record: Record,
    dstates: list[Tensor],
    totals: Totals,
) -> list[Tensor]:
    """Through the write −η U(s): adds to the gradient of s. By autograd, a chunk at a time."""
    unwritten, _ = update(config._replace(update="gradient", radius=float("inf")), x, n, states, record)
    leaves = [half(z, 1).detach().requires_grad_() for z in unwritten]
    with torch.enable_grad():
        writes = orthogonal(config, leaves)
    dws = [half(dz, 0) for dz in dstates]
    through = torch.autograd.grad(writes, leaves, [-x.eta[:, n, None, None] * dw for dw in dws])
    moved = [(u.detach() * dw).sum((-2, -1)) for u, dw in zip(writes, dws, strict=True)]
    totals.found["eta"] = -torch.stack(moved).sum(0)
    more = tuple(half(dz, 1) + ds for dz, ds in zip(dstates, through, strict=True))
    return _with_half(dstates, 1, more)


def _backward_read(
    config: LoopConfig, x: LoopInputs, n: int, z: list[Tensor], w0: Maybe, record: Record, dy: Tensor, totals: Totals,
    dinitial: Maybe,
) -> list[Outer]:  # fmt: skip
    """Of what a chunk's queries read; the factors of the states' gradients."""
    act, outer = config.network.activation, []
    dpre = dy
    if act is not None:
        hidden = record.read_hidden
        alike = None if record.grad_coef is None else hidden @ record.inputs[1].mT
        dhidden, factors = _backward_product(config, x, n, 1, hidden, alike, z[1], record, dy, totals)
        dhidden.baddbmm_(dy, w0.mT)
        dinitial.add_(hidden.mT @ dy)
        dpre = act.backward(record.read_pre, dhidden, None)
        outer.append(factors)
    scores = None if x.scores is None else x.scores[:, n]
    totals.found["phi_q"], factors = _backward_product(
        config, x, n, 0, x.phi_q[:, n], scores, z[0], record, dpre, totals
    )
    totals.found["q_by_initial"] = dpre
    return [factors, *outer]


def _backward_product(
    config: LoopConfig, x: LoopInputs, n: int, layer: int, inputs: Tensor, alike: Maybe, z: Tensor, record: Record,
    dy: Tensor, totals: Totals,
) -> tuple[Tensor, Outer]:  # fmt: skip
    """Of one layer of a read, [a x, −b x] z − (Γ/D ⊙ x kᵀ) e: the gradient of x, and the factors of that of z."""
    queries_in_start = masks(config, x, n)[1]
    if record.grad_coef is None or alike is None:
        back = masked(dy @ z[:, : z.size(1) // 2].mT, queries_in_start)
        return back, (masked(inputs, queries_in_start), dy)
    read_coef = x.read_coef[:, n].unsqueeze(-1).to(dy.dtype)
    left, right = (dy @ z.mT).chunk(2, dim=-1)
    dinputs = torch.addcmul(left * read_coef[:, 0], right, read_coef[:, 1])
    dread_coef = torch.stack([(inputs * left).sum(-1), (inputs * right).sum(-1)], dim=1).to(x.read_coef.dtype)
    dattention = torch.bmm(dy, record.errors[layer].mT).neg_()
    before = totals.errors[layer]
    attention = (record.grad_coef * alike).mT
    totals.errors[layer] = (
        torch.bmm(attention, dy).neg_() if before is None else before.baddbmm_(attention, dy, alpha=-1)
    )
    dgrad_coef = (dattention * alike).to(x.grad_coef.dtype) / record.total
    dalike = dattention * record.grad_coef
    if layer == 0:
        totals.found["scores"] = dalike
    else:
        dinputs.baddbmm_(dalike, record.inputs[layer])
        sofar = totals.inputs[layer]
        totals.inputs[layer] = dalike.mT @ inputs if sofar is None else sofar.baddbmm_(dalike.mT, inputs)
    found = totals.found
    found["read_coef"] = dread_coef + found["read_coef"] if "read_coef" in found else dread_coef
    found["grad_coef"] = dgrad_coef + found["grad_coef"] if "grad_coef" in found else dgrad_coef
    return dinputs, (twice(inputs, read_coef), dy)


def _backward_learn(
    config: LoopConfig, x: LoopInputs, n: int, z: list[Tensor], w0: Maybe, record: Record, totals: Totals,
    dinitial: Maybe,
) -> list[list[Outer]]:  # fmt: skip
    """Of the factors of a chunk's gradients; the factors of the states' gradients."""
    act, phi = config.network.activation, x.phi[:, n]
    in_start_segment = masks(config, x, n)[0]
    w = [state[:, : state.size(1) // 2] for state in z]
    outer: list[list[Outer]] = []
    if act is None:
        dpre = totals.errors[0]
        totals.found["v"] = -dpre
    else:
        hidden, error = record.inputs[1], record.errors[1]
        parts = totals.errors[0].unflatten(-1, (act.width, -1))
        dback = (record.slopes.unflatten(-1, (act.width, -1)) * parts).sum(-2)
        dslopes = (record.back.unsqueeze(-2) * parts).flatten(-2)
        derror, dhidden = totals.errors[1], totals.inputs[1]
        if in_start_segment is None:
            w_out = w0 + w[1]
            derror = derror.baddbmm_(dback, w_out)
            through = derror @ w_out.mT
        else:
            derror = derror.baddbmm_(dback, w0).baddbmm_(dback * in_start_segment, w[1])
            through = torch.baddbmm(derror @ w0.mT, derror * in_start_segment, w[1].mT)
        dhidden = through if dhidden is None else dhidden.add_(through)
        dinitial.add_(torch.baddbmm(dback.mT @ error, hidden.mT, derror))
        outer = [[(masked(dback, in_start_segment), error), (masked(hidden, in_start_segment), derror)]]
        totals.found["v"] = -derror
        dpre = act.backward(record.pre, dhidden, dslopes)
    totals.found["by_initial"] = dpre
    seen = masked(phi, in_start_segment)
    dphi = masked(dpre @ w[0].mT, in_start_segment)
    totals.found["phi"] = dphi if totals.inputs[0] is None else dphi.add_(totals.inputs[0])
    return [[(seen, dpre)], *outer]
