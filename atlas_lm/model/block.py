"""The MAG block: window attention and memory side by side, fused by a gate, then SwiGLU (M12; Titans §4.2)."""

# B batch, H heads, T tokens, D head dim, M model width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.features import unit
from atlas_lm.memory.hierarchy import Hierarchy, HierarchyState, MemorySpec
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.state import fit
from atlas_lm.model.attention import AttentionState, SlidingWindowAttention
from atlas_lm.model.convolution import CausalConv
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
    conv: Tensor | None  # (B, conv−1, 3·H·D)
    memory: HierarchyState | Tensor | None  # that of a baseline is one tensor

    def fast_weights(self) -> tuple[Tensor, ...]:
        """How far those of every memory have moved from their start."""
        if not isinstance(self.memory, HierarchyState):
            return () if self.memory is None else (self.memory,)
        memories = (self.memory.global_memory, *self.memory.local_memories)
        return tuple(change for memory in memories for change in memory.change)


class MemoryBranch(nn.Module):
    """Projections, short convolution and unit norms around a memory hierarchy: (B, T, M) → (B, T, H·D)."""

    def __init__(self, spec: MemorySpec, conv: int) -> None:
        super().__init__()
        self.heads = spec.heads
        width = spec.heads * spec.head_dim
        self.qkv = nn.Linear(spec.dim, 3 * width, bias=False)
        self.conv = CausalConv(3 * width, conv)
        self.hierarchy = Hierarchy(spec)
        self.norm = RMSNorm(spec.head_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """An associative memory from the first step on: a query finds what followed its own token.

        Queries start with the keys' projection, and a key as the sum of its token and the one before, so that "a b …
        a" asks with a for what was stored at b. Left to chance, training must first find both.
        """
        q, k, _ = self.qkv.weight.chunk(3)
        k.copy_(q)
        if self.conv.width > 1:
            self.conv.weight[-2].chunk(3)[1].add_(1.0)

    def initial_conv(self, batch: int) -> Tensor:
        return self.qkv.weight.new_zeros(batch, self.conv.width - 1, self.qkv.out_features)

    def initial_state(self, batch: int, restart: bool) -> HierarchyState:
        """The memories of a stream that has seen nothing."""
        return self.hierarchy.initial_state(batch, restart)

    def forward(
        self, x_BTM: Tensor, conv: Tensor, state: HierarchyState | None, restart_BT: Tensor | None, write: bool = True
    ) -> tuple[Tensor, Tensor, HierarchyState | None]:
        qkv = self.qkv(x_BTM)
        sizes = {"batch": qkv.size(0), "conv - 1": self.conv.width - 1, "channels": qkv.size(2)}
        q, k, v, conv = self._heads(qkv, fit("tail of the convolution", conv, sizes, qkv))
        y_BHTD, state = self.hierarchy(x_BTM, q, k, v, state, restart_BT, write)
        return normalised_heads(self.norm, y_BHTD.to(x_BTM.dtype)), conv, state

    def _heads(self, qkv: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v (B, H, T, D), and the convolution's new tail."""
        if cpu_convolution.can_run(qkv):
            q, k, v = cpu_convolution.heads(qkv, tail, self.conv.weight, self.heads)
            return q, k, v, self.conv.next_tail(qkv, tail)
        qkv, tail = self.conv(qkv, tail)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        q, k = (unit(y).to(v.dtype) for y in (q, k))
        return q, k, v, tail


class Block(nn.Module):
    """One layer; `spec` None: without a memory."""

    memory: MemoryBranch | GatedDeltaBranch | None

    def __init__(
        self, spec: MemorySpec | DeltaSpec | None, dim: int, heads: int, head_dim: int, hidden: int, window: int,
        rope_base: float, conv: int, fusion: str,
    ) -> None:  # fmt: skip
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {fusion!r}; choose one of {', '.join(FUSIONS)}")
        width = heads * head_dim
        self.norm = RMSNorm(dim)
        self.attention = SlidingWindowAttention(dim, heads, head_dim, window, rope_base)
        if isinstance(spec, DeltaSpec):
            self.memory = GatedDeltaBranch(spec, conv)
        else:
            self.memory = None if spec is None else MemoryBranch(spec, conv)
        self.fusion = None if spec is None else Fusion(fusion, width)
        self.out = nn.Linear(width, dim, bias=False)
        self.ffn_norm = RMSNorm(dim)
        self.ffn = SwiGLU(dim, hidden)

    def initial_state(self, batch: int, restart: bool) -> BlockState:
        """The state of a stream (nothing is ever reset)."""
        memory = self.memory
        return BlockState(
            self.attention.initial_state(batch),
            None if memory is None else memory.initial_conv(batch),
            None if memory is None else memory.initial_state(batch, restart),
        )

    def forward(
        self, x_BTM: Tensor, state: BlockState | None, restart_BT: Tensor | None, write: bool = True
    ) -> tuple[Tensor, Tensor | None, BlockState | None]:
        """(B, T, M) → (B, T, M), the fusion gates (B, T, H·D) and, with a state, the next state.

        ValueError for a state of another block or batch.
        """
        if state is not None and (state.memory is None or state.conv is None) != (self.memory is None):
            has, lacks = ("state", "model") if self.memory is None else ("model", "state")
            raise ValueError(f"the {has} has a memory, the {lacks} has none; start from initial_state of this model")
        y = self.norm(x_BTM)
        attended, cache = self.attention(y, state.attention if state else None)
        conv, memory_state, gate = None, None, None
        if self.memory is not None and self.fusion is not None:
            tail = state.conv if state and state.conv is not None else self.memory.initial_conv(y.size(0))
            remembered, conv, memory_state = self.memory(y, tail, state.memory if state else None, restart_BT, write)
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
