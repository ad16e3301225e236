"""Sliding-window attention with rotary positions, at a cost linear in the sequence (M12)."""

# B batch, H heads, T tokens, D head dim, W window, K blocks, C tokens of a block, M model width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.host_reads import may_look
from atlas_lm.memory.kernels import attention as cpu_attention
from atlas_lm.memory.state import all_finite, fit
from atlas_lm.model.convolution import CausalConv, make_associative


class AttentionState(NamedTuple):
    """The rolling cache: the last W − 1 keys and values. Constant size."""

    k: Tensor  # (B, H, W−1, D), already rotated
    v: Tensor  # (B, H, W−1, D)
    valid: Tensor  # (W−1,) bool: slots that hold a token
    position: int  # of the next token
    base: float  # of the rotary positions that the keys were turned by
    conv: Tensor | None = None  # (B, conv−1, 3·H·D): the convolution's last inputs


def rotate(x_BHTD: Tensor, position: int, base: float) -> Tensor:
    """Rotary position embedding (RoPE, arXiv 2104.09864) of T tokens that start at `position`."""
    turns = angles(x_BHTD, x_BHTD.size(-2), x_BHTD.size(-1), position, base)
    cos, sin = (turn.to(x_BHTD.dtype) for turn in turns)
    x, y = x_BHTD.chunk(2, dim=-1)
    return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1)


def rotated(x_BHTD: Tensor, by: int, base: float) -> Tensor:
    """Keys that were rotated for their positions, as they are `by` positions later."""
    if by == 0:
        return x_BHTD
    cos, sin = (turn.to(x_BHTD.dtype) for turn in angles(x_BHTD, 1, x_BHTD.size(-1), by, base))
    x, y = x_BHTD.chunk(2, dim=-1)
    return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1)


def angles(like: Tensor, T: int, D: int, position: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D/2) of rotary positions, in at least float32."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    frequency = base ** (-torch.arange(0, D, 2, device=like.device, dtype=wide) / D)
    angle = torch.arange(position, position + T, device=like.device, dtype=wide).unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def window_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, valid: Tensor, window: int) -> Tensor:
    """Each token attends to itself and the `window` − 1 before it: (B, H, T, D).

    k and v hold T + window − 1 tokens, the cache first. Works on blocks of one window: no T×T mask.
    A key or value that is not finite makes NaN of the tokens that see it, and of no others.
    """
    if may_look(q_BHTD) or q_BHTD.is_meta or q_BHTD.size(2) == 1:
        y_BHTD = _in_blocks(q_BHTD, k_BHTD, v_BHTD, valid, window)
        if all_finite(y_BHTD):
            return y_BHTD
    # a mask leaves 0 · NaN in the products: without these tokens, then NaN where they are seen
    bad_BHS = ~(k_BHTD.isfinite() & v_BHTD.isfinite()).all(-1)
    k_BHTD, v_BHTD = (x.masked_fill(bad_BHS.unsqueeze(-1), 0.0) for x in (k_BHTD, v_BHTD))
    count = bad_BHS.cumsum(-1)
    seen_BHT = count[..., window - 1 :] > nnf.pad(count, (1, 0))[..., : q_BHTD.size(2)]
    y_BHTD = _in_blocks(q_BHTD, k_BHTD, v_BHTD, valid, window)
    return y_BHTD + torch.where(seen_BHT, torch.nan, 0.0).unsqueeze(-1).to(y_BHTD.dtype)


def _in_blocks(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, valid: Tensor, window: int) -> Tensor:
    """Blocks are sequences of their own: the fused kernels of a GPU take four dimensions, and keys in eights."""
    B, T = q_BHTD.size(0), q_BHTD.size(2)
    C = min(window, T)
    K = -(-T // C)
    span = window - 1 + C
    aligned = -(-span // 8) * 8
    missing, beyond = K * C - T, K * C - T + aligned - span
    q = nnf.pad(q_BHTD, (0, 0, 0, missing)).unflatten(2, (K, C)).transpose(1, 2).flatten(0, 1)
    k, v = (nnf.pad(x, (0, 0, 0, beyond)).unfold(2, aligned, C).mT for x in (k_BHTD, v_BHTD))
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    ones = torch.ones(C, aligned, dtype=torch.bool, device=q.device)
    mask = ones.triu() & ones.tril(window - 1) & nnf.pad(valid, (0, beyond)).unfold(0, aligned, C).unsqueeze(1)
    mask = mask | ~mask.any(-1, keepdim=True)  # padded queries: any finite value will do
    mask = mask.expand(B, K, C, aligned).flatten(0, 1).unsqueeze(1)
    y = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.unflatten(0, (B, K)).transpose(1, 2).flatten(2, 3)[:, :, :T]


class SlidingWindowAttention(nn.Module):
    """Projections, RoPE and window attention; heads are merged again, the output projection is the block's.

    With a convolution of `conv` > 1 tokens on queries, keys and values it finds what followed its own token from the
    first step on, as a memory does.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, window: int, rope_base: float, conv: int = 1) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"the attention window must be at least 1 token, got {window}")
        self.heads, self.window, self.rope_base = heads, window, rope_base
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.conv = CausalConv(3 * heads * head_dim, conv) if conv != 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.conv is not None:
            make_associative(self.qkv.weight, self.conv)

    def initial_state(self, batch: int) -> AttentionState:
        weight = self.qkv.weight
        cache = weight.new_zeros(batch, self.heads, self.window - 1, self.head_dim)
        valid = torch.zeros(self.window - 1, dtype=torch.bool, device=weight.device)
        return AttentionState(cache, cache, valid, 0, self.rope_base, self._initial_conv(batch))

    def _initial_conv(self, batch: int) -> Tensor | None:
        if self.conv is None:
            return None
        return self.qkv.weight.new_zeros(batch, self.conv.width - 1, self.qkv.out_features)

    def forward(self, x_BTM: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState | None]:
        """(B, T, M) → (B, T, H·D) and, with a cache, the cache after the last token.

        ValueError for a cache of another attention or batch.
        """
        return self.attend(*self.project(x_BTM, state), state)

    def project(self, x_BTM: Tensor, state: AttentionState | None) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values (B, T, 3·H·D) after the convolution, and its last inputs."""
        qkv = self.qkv(x_BTM)
        if state is not None and (state.conv is None) != (self.conv is None):
            has, lacks = ("state", "model") if self.conv is None else ("model", "state")
            raise ValueError(f"the {has}'s attention has a convolution, the {lacks}'s has none; prefill again")
        if self.conv is None:
            return qkv, None
        tail = self._initial_conv(x_BTM.size(0)) if state is None else state.conv
        assert tail is not None
        sizes = {"batch": qkv.size(0), "attention_conv - 1": self.conv.width - 1, "channels": qkv.size(2)}
        return self.conv(qkv, fit("tail of the attention's convolution", tail, sizes, qkv))

    def attend(
        self, qkv: Tensor, tail: Tensor | None, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState | None]:
        """From what `project` returns."""
        if state is None:
            if cpu_attention.can_run(qkv):
                cos, sin = angles(qkv, qkv.size(1), self.head_dim, 0, self.rope_base)
                return cpu_attention.window_attention(qkv, cos, sin, self.heads, self.window), None
            return self._stream(qkv, None, self.initial_state(qkv.size(0)))[0], None
        return self._stream(qkv, tail, state)

    def _stream(self, qkv: Tensor, tail: Tensor | None, state: AttentionState) -> tuple[Tensor, AttentionState]:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        q, k = (rotate(y, state.position, self.rope_base) for y in (q, k))
        if state.base != self.rope_base:
            raise ValueError(
                f"this state's keys were turned by rope_base {state.base}, this model's are by {self.rope_base}; "
                "prefill again"
            )
        slots = {"window - 1": self.window - 1}
        sizes = {"batch": k.size(0), "heads": self.heads} | slots | {"channels": self.head_dim}
        k = torch.cat([fit("keys of the attention", state.k, sizes, k), k], dim=2)
        v = torch.cat([fit("values of the attention", state.v, sizes, v), v], dim=2)
        fit("filled slots of the attention", state.valid, slots, v, torch.bool)
        valid = torch.cat([state.valid, state.valid.new_ones(q.size(2))])
        y = window_attention(q, k, v, valid, self.window)
        keep = slice(k.size(2) - self.window + 1, None)
        # copies: a view would keep the whole prefill alive
        k, v, valid, position = k[:, :, keep].clone(), v[:, :, keep].clone(), valid[keep], state.position + q.size(2)
        return y.transpose(1, 2).flatten(2), AttentionState(k, v, valid, position, self.rope_base, tail)
