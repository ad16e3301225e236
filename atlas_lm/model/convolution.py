"""The short convolution on queries, keys and values."""

# B batch, T tokens, M channels, W width − 1

from __future__ import annotations

import torch
from torch import Tensor, nn

from atlas_lm.memory.kernels import convolution as kernel


class CausalConv(nn.Module):
    """Depthwise causal convolution over the last `width` tokens, the identity at first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"the width of the short convolution must be at least 1 token, got {width}")
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.3 * self.width**-0.5)
        self.weight[-1] += 1.0

    def forward(self, x_BTM: Tensor, tail_BWM: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M) and the last width − 1 inputs before it → (B, T, M) and the new tail."""
        if kernel.can_run(x_BTM):
            return kernel.convolve(x_BTM, tail_BWM, self.weight), self.next_tail(x_BTM, tail_BWM)
        T = x_BTM.size(1)
        row = torch.cat([tail_BWM.to(x_BTM.dtype), x_BTM], dim=1)
        weight = self.weight.to(row.dtype)  # one precision: mixed products are five times slower
        y = row[:, :T] * weight[0]
        for i in range(1, self.width):
            y = torch.addcmul(y, row[:, i : i + T], weight[i])
        return y, self.next_tail(x_BTM, tail_BWM)

    def next_tail(self, x_BTM: Tensor, tail_BWM: Tensor) -> Tensor:
        """The last width − 1 inputs, those of calls before included."""
        keep = self.width - 1
        row = torch.cat([tail_BWM.to(x_BTM.dtype), x_BTM[:, max(0, x_BTM.size(1) - keep) :]], dim=1)
        return row[:, row.size(1) - keep :].clone()


@torch.no_grad()
def make_associative(qkv_weight: Tensor, conv: CausalConv) -> None:
    """A query finds what followed its own token, from the first step on.

    Queries start with the keys' projection, and a key as the sum of its token and the one before, so that "a b … a"
    asks with a for what was stored at b. Left to chance, training must first find both.
    """
    q, k, _ = qkv_weight.chunk(3)
    k.copy_(q)
    if conv.width > 1:
        conv.weight[-2].chunk(3)[1].add_(1.0)
