"""What the loop over chunks takes and keeps, whichever of its forms runs (M7)."""

# G batch × heads, K chunks, C chunk, N = C + halo tokens of a block, F feature dim, P pre-activations, E hidden dim
# of layer l: R rows (F or E), Q columns (P or D)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_lm.memory.network import Network

Maybe = Any  # a tensor, or None where the rule has no use for it


def serve_once(ctx: Any) -> None:
    """RuntimeError at the second backward pass through a graph."""
    if getattr(ctx, "served", False):
        raise RuntimeError("the memory's graph is gone after its first backward pass; call the model again")
    ctx.served = True


class LoopConfig(NamedTuple):
    """What is no tensor."""

    network: Network
    context: int
    update: str
    newton_schulz_steps: int
    radius: float
    # of matrix products and of what they give; states and coefficients are wide, and so is D once it is summed
    operands: torch.dtype
    complete: int  # chunks that end; the last one may be unfinished
    train: bool  # keep what a backward pass needs


class ChunkBatch(NamedTuple):
    """What a scan gives of all chunks; from `decay` on coefficients, the gates of every token where reads see them."""

    phi: Tensor  # (G, K, N, F)
    v: Tensor  # (G, K, N, D)
    phi_q: Tensor  # (G, K, C, F)
    gamma: Tensor  # (G, K, N)
    same_segment: Maybe  # (G, K, N, N) tokens of one segment, no gradient; None without restarts
    in_start_segment: Maybe  # (G, K, N, 1) tokens of W_ξ's segment, no gradient
    decay: Tensor  # (G, K, 2, 2) [[α, −β], [0, θ]]
    eta: Tensor  # (G, K) of Newton–Schulz
    write_coef: Tensor  # (G, K, 2, N) −ω_w, ω_s
    token_eta: Maybe  # (G, K, C), as the next three: `coefficients.Decays`; None where reads are at the chunk's start
    intake: Maybe
    retain: Maybe
    carry: Maybe


class LoopInputs(NamedTuple):
    """What does not depend on the fast weights. `scores`, `read_coef` and `grad_coef` are for reads inside chunks."""

    phi: Tensor  # these as in `ChunkBatch`
    v: Tensor
    phi_q: Tensor
    gamma: Tensor  # no gradient
    same_segment: Maybe
    in_start_segment: Maybe
    decay: Tensor
    eta: Tensor
    write_coef: Tensor
    scores: Maybe  # (G, K, C, N) φ(q)·φ(k)
    read_coef: Maybe  # (G, K, 2, C) a, −b
    grad_coef: Maybe  # (G, K, C, N) Γ
    initial_out: Maybe  # (G, E, D) W_init of the second layer
    by_initial: Tensor  # (G, K, N, P) φ(k) W_init
    q_by_initial: Tensor  # (G, K, C, P) φ(q) W_init


class Record(NamedTuple):
    """What the backward pass needs of a chunk."""

    inputs: tuple[Tensor, ...]  # x_l
    errors: tuple[Tensor, ...]  # e_l
    pre: Tensor
    slopes: Maybe
    back: Maybe  # e₂ (W + w₂)ᵀ
    total: Maybe  # D (G, C or 1, N)
    grad_coef: Maybe  # Γ/D
    read_pre: Tensor
    read_hidden: Maybe
    scales: tuple[Tensor, ...] = ()  # by which the ball held the matrices of each layer (G, matrices); () none


def flattened(records: Sequence[Record]) -> tuple[list[Tensor], list[Any]]:
    """The tensors of records, to be saved by autograd, and what `restored` needs to put them back."""
    tensors: list[Tensor] = []

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return len(tensors) - 1
        return tuple(map(visit, value)) if isinstance(value, tuple) else None

    return tensors, [visit(tuple(record)) for record in records]


def restored(tensors: Sequence[Tensor], places: Sequence[Any]) -> list[Record]:
    """The records again."""

    def visit(place: Any) -> Any:
        if isinstance(place, tuple):
            return tuple(map(visit, place))
        return None if place is None else tensors[place]

    return [Record._make(visit(place)) for place in places]
