"""The memory of a gated delta net, in the place of ours: a baseline of equal state (arXiv 2412.06464).

As there: short convolution and SiLU on q, k and v, keys and queries of unit norm, decay as Mamba-2 has it, outputs
normalised. Keys and queries are shared by all value heads. The block's fusion gate stands for the output gate.
"""

# B batch, H value heads, T tokens, D key dim, E value dim, M model width

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory import gated_delta
from atlas_lm.memory.features import unit
from atlas_lm.memory.state import fit, wide_logits
from atlas_lm.model.convolution import CausalConv
from atlas_lm.model.norm import RMSNorm, normalised_heads

KEY_DIM = 256  # the largest that fused kernels for this rule take


class DeltaSpec(NamedTuple):
    """What the branch is built from. A stream carries heads · key · value numbers."""

    dim: int  # model width
    width: int  # of what comes out
    heads: int
    key: int
    value: int


def spec_of_state(dim: int, width: int, numbers: int) -> DeltaSpec:
    """With heads of about KEY_DIM² numbers each, `numbers` in all."""
    key = min(KEY_DIM, max(1, round(math.sqrt(numbers))))
    heads = max(1, round(numbers / key**2))
    return DeltaSpec(dim, width, heads, key, max(1, round(numbers / (heads * key))))


class GatedDeltaBranch(nn.Module):
    """(B, T, M) → (B, T, width), with the interface of `block.MemoryBranch`."""

    A_MAX, DT = 16.0, (1e-3, 0.1)  # decay as α = exp(−A·dt) at first, both drawn as in the reference implementation

    def __init__(self, spec: DeltaSpec, conv: int) -> None:
        super().__init__()
        self.spec = spec
        dim, width, heads, key, value = spec
        self.qkv = nn.Linear(dim, 2 * key + heads * value, bias=False)
        self.conv = CausalConv(2 * key + heads * value, conv)
        self.gates = nn.Linear(dim, 2 * heads)
        self.log_decay = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(value)
        self.out = nn.Linear(heads * value, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Associative from the first step on, as `block.MemoryBranch` is; without that it learns later."""
        _, _, heads, key, _ = self.spec
        self.qkv.weight[key : 2 * key].copy_(self.qkv.weight[:key])
        if self.conv.width > 1:
            self.conv.weight[-2, key : 2 * key].add_(1.0)
        self.log_decay.uniform_(0, self.A_MAX).clamp_(min=1e-2).log_()
        low, high = (math.log(x) for x in self.DT)
        dt = torch.empty_like(self.log_decay).uniform_(low, high).exp()
        nn.init.normal_(self.gates.weight, std=0.02)
        self.gates.bias[:heads] = dt.expm1().log()  # softplus⁻¹
        self.gates.bias[heads:] = 1.0  # write with 3/4 of full strength

    def initial_conv(self, batch: int) -> Tensor:
        return self.qkv.weight.new_zeros(batch, self.conv.width - 1, self.qkv.out_features)

    def initial_state(self, batch: int) -> Tensor:
        """A stream that has seen nothing: (B, H, D, E)."""
        wide = torch.promote_types(self.qkv.weight.dtype, torch.float32)
        return self.qkv.weight.new_zeros(batch, *self.spec[2:], dtype=wide)

    def forward(
        self,
        x_BTM: Tensor,
        conv: Tensor,
        state: Tensor | None,
        restart_BT: Tensor | None,
        write: bool = True,
        qkv_BTM: Tensor | None = None,  # the attention's: its own are others
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        _, _, heads, key, value = self.spec
        qkv = self.qkv(x_BTM)
        channels = {"batch": qkv.size(0), "conv - 1": self.conv.width - 1, "channels": qkv.size(2)}
        qkv, conv = self.conv(qkv, fit("tail of the convolution", conv, channels, qkv))
        q, k, v = nnf.silu(qkv).split([key, key, heads * value], dim=-1)
        v_BHTE = v.unflatten(-1, (heads, value)).transpose(1, 2)
        rate, beta = wide_logits(self.gates, x_BTM).mT.chunk(2, dim=1)
        alpha = (-self.log_decay.exp().unsqueeze(-1) * nnf.softplus(rate)).exp()
        beta = beta.sigmoid()
        if not write:
            alpha, beta = torch.ones_like(alpha), torch.zeros_like(beta)
        if restart_BT is not None:
            alpha = alpha.masked_fill(restart_BT.unsqueeze(1), 0.0)
        B = x_BTM.size(0)
        before = self.initial_state(B)
        if state is not None:
            sizes = dict(zip(("batch", "heads", "key", "value"), before.shape, strict=True))
            before = fit("fast weights", state, sizes, before)
        q, k = unit(q).unsqueeze(1), unit(k).unsqueeze(1)
        y_BHTE, after = gated_delta.scan(q, k, v_BHTE, alpha, beta, before)
        y = self.out(normalised_heads(self.norm, y_BHTE.to(x_BTM.dtype)))
        return y, conv, None if state is None else after
