"""The gradients of `chunk_step.py`, in closed form; D has none.

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
from atlas_lm.memory.loop.types import (
    Inputs,
    Maybe,
    Plan,
    Record,
    add_outer,
    half,
    masked,
    masks,
    mix,
    on_gradients,
    orthogonal,
    twice,
    update,
)


class Totals:
    """Gradients on their way back through one chunk."""

    def __init__(self) -> None:
        self.inputs: list[Maybe] = [None, None]
        self.errors: list[Maybe] = [None, None]
        self.found: dict[str, Tensor] = {}


def gradients(
    plan: Plan, x: Inputs, n: int, states: list[Tensor], record: Record, dy: Tensor, dstates: list[Tensor],
    dinitial: Maybe,
) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """The gradients of the states before a chunk, given those of the states behind it, and of its inputs."""
    totals = Totals()
    if n < plan.complete:
        dstates = _backward_update(plan, x, n, states, record, dstates, totals)
    z = [state.to(plan.operands) for state in states]
    w0 = None if x.initial_out is None else x.initial_out.to(plan.operands)
    read = _backward_read(plan, x, n, z, w0, record, dy, totals, dinitial)
    learned = None
    if totals.errors[0] is not None:
        learned = _backward_learn(plan, x, n, z, w0, record, totals, dinitial)
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
    plan: Plan, x: Inputs, n: int, states: list[Tensor], record: Record, dstates: list[Tensor], totals: Totals
) -> list[Tensor]:
    if record.bounded:
        dstates = _backward_ball(plan, x, n, states, record, dstates)
    if plan.update == "newton_schulz":
        dstates = _backward_orthogonal(plan, x, n, states, record, dstates, totals)
    on, before = on_gradients(x, n, record), []
    ddecay: Any = 0.0
    don: Any = 0.0
    for l, (z, dz, inputs, error) in enumerate(zip(states, dstates, record.inputs, record.errors, strict=True)):
        low = dz.to(error.dtype)
        totals.errors[l] = twice(inputs, on) @ low
        left, right = (error @ low.mT).chunk(2, dim=-1)
        totals.inputs[l] = torch.addcmul(left * on[:, 0], right, on[:, 1])
        don = don + torch.stack([(inputs * left).sum(-1), (inputs * right).sum(-1)], dim=1).to(x.on.dtype)
        halves, dhalves = (y.unflatten(1, (2, -1)).flatten(2) for y in (z, dz))
        ddecay = ddecay + dhalves @ halves.mT
        before.append(mix(x.decay[:, n].mT, dz))
    totals.found["on"] = don if record.total is None else don / record.total[:, -1:]
    totals.found["decay"] = ddecay
    return before


def _with_half(states: list[Tensor], which: int, halves: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies of the states with one half replaced."""
    copies = [z.clone() for z in states]
    for z, new in zip(copies, halves, strict=True):
        half(z, which).copy_(new)
    return copies


def _backward_ball(
    plan: Plan, x: Inputs, n: int, states: list[Tensor], record: Record, dstates: list[Tensor]
) -> list[Tensor]:
    """Through the projection onto the ball, which acts in few chunks: by autograd."""
    free, _ = update(plan._replace(radius=float("inf")), x, n, states, record)
    leaves = [half(z, 0).detach().requires_grad_() for z in free]
    with torch.enable_grad():
        held = net.shrink(plan.network, tuple(leaves), plan.radius)
    return _with_half(dstates, 0, torch.autograd.grad(held, leaves, [half(dz, 0) for dz in dstates]))


def _backward_orthogonal(
    plan: Plan, x: Inputs, n: int, states: list[Tensor], record: Record, dstates: list[Tensor], totals: Totals
) -> list[Tensor]:
    """Through the write −η U(s): adds to the gradient of s. By autograd, a chunk at a time."""
    unwritten, _ = update(plan._replace(update="gradient", radius=float("inf")), x, n, states, record)
    leaves = [half(z, 1).detach().requires_grad_() for z in unwritten]
    with torch.enable_grad():
        writes = orthogonal(plan, leaves)
    dws = [half(dz, 0) for dz in dstates]
    through = torch.autograd.grad(writes, leaves, [-x.eta[:, n, None, None] * dw for dw in dws])
    along = [(u.detach() * dw).sum((-2, -1)) for u, dw in zip(writes, dws, strict=True)]
    totals.found["eta"] = -torch.stack(along).sum(0)
    more = tuple(half(dz, 1) + ds for dz, ds in zip(dstates, through, strict=True))
    return _with_half(dstates, 1, more)


def _backward_read(
    plan: Plan, x: Inputs, n: int, z: list[Tensor], w0: Maybe, record: Record, dy: Tensor, totals: Totals,
    dinitial: Maybe,
) -> list[Outer]:  # fmt: skip
    """Of what a chunk's queries read; the factors of the states' gradients."""
    act, outer = plan.network.activation, []
    dpre = dy
    if act is not None:
        hidden = record.read_hidden
        alike = None if record.over is None else hidden @ record.inputs[1].mT
        dhidden, factors = _backward_product(plan, x, n, 1, hidden, alike, z[1], record, dy, totals)
        dhidden.baddbmm_(dy, w0.mT)
        dinitial.add_(hidden.mT @ dy)
        dpre = act.backward(record.read_pre, dhidden, None)
        outer.append(factors)
    scores = None if x.scores is None else x.scores[:, n]
    totals.found["phi_q"], factors = _backward_product(plan, x, n, 0, x.phi_q[:, n], scores, z[0], record, dpre, totals)
    totals.found["q_by_initial"] = dpre
    return [factors, *outer]


def _backward_product(
    plan: Plan, x: Inputs, n: int, layer: int, inputs: Tensor, alike: Maybe, z: Tensor, record: Record,
    dy: Tensor, totals: Totals,
) -> tuple[Tensor, Outer]:  # fmt: skip
    """Of one layer of a read, [a x, −b x] z − (Γ/D ⊙ x kᵀ) e: the gradient of x, and the factors of that of z."""
    own = masks(plan, x, n)[1]
    if record.over is None or alike is None:
        back = masked(dy @ z[:, : z.size(1) // 2].mT, own)
        return back, (masked(inputs, own), dy)
    at = x.at[:, n].unsqueeze(-1).to(dy.dtype)
    left, right = (dy @ z.mT).chunk(2, dim=-1)
    dinputs = torch.addcmul(left * at[:, 0], right, at[:, 1])
    dat = torch.stack([(inputs * left).sum(-1), (inputs * right).sum(-1)], dim=1).to(x.at.dtype)
    dattention = torch.bmm(dy, record.errors[layer].mT).neg_()
    before = totals.errors[layer]
    attention = (record.over * alike).mT
    totals.errors[layer] = (
        torch.bmm(attention, dy).neg_() if before is None else before.baddbmm_(attention, dy, alpha=-1)
    )
    dover = (dattention * alike).to(x.over.dtype) / record.total
    dalike = dattention * record.over
    if layer == 0:
        totals.found["scores"] = dalike
    else:
        dinputs.baddbmm_(dalike, record.inputs[layer])
        sofar = totals.inputs[layer]
        totals.inputs[layer] = dalike.mT @ inputs if sofar is None else sofar.baddbmm_(dalike.mT, inputs)
    found = totals.found
    found["at"] = dat + found["at"] if "at" in found else dat
    found["over"] = dover + found["over"] if "over" in found else dover
    return dinputs, (twice(inputs, at), dy)


def _backward_learn(
    plan: Plan, x: Inputs, n: int, z: list[Tensor], w0: Maybe, record: Record, totals: Totals,
    dinitial: Maybe,
) -> list[list[Outer]]:  # fmt: skip
    """Of the factors of a chunk's gradients; the factors of the states' gradients."""
    act, phi = plan.network.activation, x.phi[:, n]
    old = masks(plan, x, n)[0]
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
        if old is None:
            w_out = w0 + w[1]
            derror = derror.baddbmm_(dback, w_out)
            through = derror @ w_out.mT
        else:
            derror = derror.baddbmm_(dback, w0).baddbmm_(dback * old, w[1])
            through = torch.baddbmm(derror @ w0.mT, derror * old, w[1].mT)
        dhidden = through if dhidden is None else dhidden.add_(through)
        dinitial.add_(torch.baddbmm(dback.mT @ error, hidden.mT, derror))
        outer = [[(masked(dback, old), error), (masked(hidden, old), derror)]]
        totals.found["v"] = -derror
        dpre = act.backward(record.pre, dhidden, dslopes)
    totals.found["by_initial"] = dpre
    seen = masked(phi, old)
    dphi = masked(dpre @ w[0].mT, old)
    totals.found["phi"] = dphi if totals.inputs[0] is None else dphi.add_(totals.inputs[0])
    return [[(seen, dpre)], *outer]
