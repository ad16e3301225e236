"""The MAG block: window attention and memory side by side, fused by a gate, then SwiGLU (M12; Titans §4.2)."""

# B batch, H heads, T tokens, D head dim, M model width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.features import unit
from atlas_lm.memory.hierarchy import Hierarchy, HierarchyState
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.state import fit
from atlas_lm.model.attention import AttentionState, SlidingWindowAttention
from atlas_lm.model.convolution import CausalConv, make_associative
from atlas_lm.model.gated_delta import DeltaSpec, GatedDeltaBranch
from atlas_lm.model.norm import RMSNorm, normalised_heads

FUSIONS = ("multiplicative", "normalised_product", "convex")


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) ⊙ W_up x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(nnf.silu(gate) * up)


class BlockState(NamedTuple):
    """What a block carries between two calls."""

    attention: AttentionState
    conv: Tensor | None  # (B, conv−1, 3·H·D) of the memory's own projections
    memory: HierarchyState | Tensor | None  # that of a baseline is one tensor

    def fast_weights(self) -> tuple[Tensor, ...]:
        """How far those of every memory have moved from their start."""
        if not isinstance(self.memory, HierarchyState):
            return () if self.memory is None else (self.memory,)
        memories = (self.memory.global_memory, *self.memory.local_memories)
        return tuple(change for memory in memories if memory is not None for change in memory.change)


def memory_heads(qkv: Tensor, tail: Tensor, conv: CausalConv | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3·H·D), convolved where there is a convolution → q and k of unit norm, and v: (B, H, T, D) each."""
    if cpu_convolution.can_run(qkv):
        weight = qkv.new_ones(1, qkv.size(2)) if conv is None else conv.weight
        return cpu_convolution.heads(qkv, tail, weight, heads)
    if conv is not None:
        qkv = conv(qkv, tail)[0]
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
    q, k = (unit(y).to(v.dtype) for y in (q, k))
    return q, k, v


class MemoryBranch(nn.Module):
    """Projections, short convolution and unit norms around a memory hierarchy: (B, T, M) → (B, T, H·D).

    `conv` None: the queries, keys and values are given instead.
    """

    def __init__(self, spec: MemorySpec, conv: int | None) -> None:
        super().__init__()
        self.heads = spec.heads
        width = spec.heads * spec.head_dim
        self.qkv = None if conv is None else nn.Linear(spec.dim, 3 * width, bias=False)
        self.conv = None if conv is None else CausalConv(3 * width, conv)
        self.hierarchy = Hierarchy(spec)
        self.norm = RMSNorm(spec.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """An associative memory from the first step on."""
        if self.qkv is not None and self.conv is not None:
            make_associative(self.qkv.weight, self.conv)

    def initial_conv(self, batch: int) -> Tensor | None:
        if self.qkv is None or self.conv is None:
            return None
        return self.qkv.weight.new_zeros(batch, self.conv.width - 1, self.qkv.out_features)

    def initial_state(self, batch: int) -> HierarchyState:
        """The memories of a stream that has seen nothing."""
        return self.hierarchy.initial_state(batch)

    def forward(
        self,
        x_BTM: Tensor,
        conv: Tensor | None,
        state: HierarchyState | None,
        restart_BT: Tensor | None,
        write: bool = True,
        qkv_BTM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, HierarchyState | None]:
        """`qkv_BTM`: those of the attention, (B, T, 3·H·D), which a memory without its own takes."""
        if self.qkv is None or self.conv is None or conv is None:
            assert qkv_BTM is not None
            q, k, v = memory_heads(qkv_BTM, qkv_BTM[:, :0], None, self.heads)
        else:
            qkv = self.qkv(x_BTM)
            sizes = {"batch": qkv.size(0), "conv - 1": self.conv.width - 1, "channels": qkv.size(2)}
            tail = fit("tail of the convolution", conv, sizes, qkv)
            q, k, v = memory_heads(qkv, tail, self.conv, self.heads)
            conv = self.conv.next_tail(qkv, tail)
        y_BHTD, state = self.hierarchy(x_BTM, q, k, v, state, restart_BT, write)
        return normalised_heads(self.norm, y_BHTD.to(x_BTM.dtype)), conv, state


def _kind_of(state: HierarchyState | Tensor | None) -> str:
    return "none" if state is None else "a memory" if isinstance(state, HierarchyState) else "a gated delta net"


def _kind_of_branch(memory: MemoryBranch | GatedDeltaBranch | None) -> str:
    return "none" if memory is None else "a memory" if isinstance(memory, MemoryBranch) else "a gated delta net"


class Block(nn.Module):
    """One layer; `spec` None: without a memory."""

    memory: MemoryBranch | GatedDeltaBranch | None

    def __init__(
        self, spec: MemorySpec | DeltaSpec | None, dim: int, heads: int, head_dim: int, hidden: int, window: int,
        rope_base: float, conv: int, fusion: str, attention_conv: int = 1, share_qkv: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {fusion!r}; choose one of {', '.join(FUSIONS)}")
        width = heads * head_dim
        self.norm = RMSNorm(dim)
        self.attention = SlidingWindowAttention(dim, heads, head_dim, window, rope_base, attention_conv)
        if isinstance(spec, DeltaSpec):
            self.memory = GatedDeltaBranch(spec, conv)
        else:
            self.memory = None if spec is None else MemoryBranch(spec, None if share_qkv else conv)
        self.fusion = None if spec is None else Fusion(fusion, width)
        self.out = nn.Linear(width, dim, bias=False)
        self.ffn_norm = RMSNorm(dim)
        self.ffn = SwiGLU(dim, hidden)

    def initial_state(self, batch: int) -> BlockState:
        """The state of a stream that has seen nothing."""
        memory = self.memory
        return BlockState(
            self.attention.initial_state(batch),
            None if memory is None else memory.initial_conv(batch),
            None if memory is None else memory.initial_state(batch),
        )

    def forward(
        self, x_BTM: Tensor, state: BlockState | None, restart_BT: Tensor | None, write: bool = True
    ) -> tuple[Tensor, Tensor | None, BlockState | None]:
        """(B, T, M) → (B, T, M), the fusion gates (B, T, H·D) and, with a state, the next state.

        ValueError for a state of another block or batch.
        """
        if state is not None and _kind_of(state.memory) != _kind_of_branch(self.memory):
            raise ValueError(
                f"the state has {_kind_of(state.memory)}, the model has {_kind_of_branch(self.memory)}; start from "
                "initial_state of this model"
            )
        y = self.norm(x_BTM)
        qkv, tail = self.attention.project(y, state.attention if state else None)
        attended, cache = self.attention.attend(qkv, tail, state.attention if state else None)
        conv, memory_state, gate = None, None, None
        if self.memory is not None and self.fusion is not None:
            conv = self.memory.initial_conv(y.size(0))
            if state is not None:
                if (state.conv is None) != (conv is None):
                    raise ValueError("the state's memory and the model's differ in share_qkv; prefill again")
                conv = state.conv
            before = state.memory if state else None
            remembered, conv, memory_state = self.memory(y, conv, before, restart_BT, write, qkv)
            attended, gate = self.fusion(attended, remembered)
        x_BTM = x_BTM + self.out(attended)
        x_BTM = x_BTM + self.ffn(self.ffn_norm(x_BTM))
        return x_BTM, gate, None if cache is None else BlockState(cache, conv, memory_state)


class Fusion(nn.Module):
    """How the memory acts on the attention's output (M12).

    With `convex` a gate g of 0 leaves attention alone, with the others it silences the attention.

    multiplicative:      attention ⊙ g,                       g = σ(Linear(memory))
    normalised_product:  RMSNorm(attention) ⊙ g,              g = σ(memory ⊙ w), memory already normalised (Titans)
    convex:              g ⊙ memory + (1 − g) ⊙ attention,    g = σ(Linear(memory))
    """

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "normalised_product":
            self.norm = RMSNorm(width)
            self.weight = nn.Parameter(torch.empty(width))
            self.reset_parameters()
        else:
            self.gate = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        if self.kind == "normalised_product":
            nn.init.ones_(self.weight)

    def forward(self, attended: Tensor, remembered: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, T, H·D) → the fused output and the gate."""
        if self.kind == "normalised_product":
            gate = torch.sigmoid(remembered * self.weight)
            return self.norm(attended) * gate, gate
        gate = torch.sigmoid(self.gate(remembered))
        if self.kind == "convex":
            return gate * remembered + (1 - gate) * attended, gate
        return attended * gate, gate
