"""Sliding-window attention where no compiled code of ours runs."""

import torch
from torch.nn import functional as nnf

from atlas_lm.model import attention
from atlas_lm.model.attention import SlidingWindowAttention


def test_a_gpu_finds_what_its_fused_kernels_take(monkeypatch):
    """Four dimensions, keys in eights, a mask for each block: with five dimensions CUDA computes all scores apart."""
    seen = []
    attend = nnf.scaled_dot_product_attention

    def watched(q, k, v, attn_mask):
        seen.append((q.shape, k.shape, v.shape, attn_mask.shape))
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(attention.nnf, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention.cpu_attention, "can_run", lambda *_: False)
    SlidingWindowAttention(16, 2, 8, 6, 1e4)(torch.randn(3, 20, 16), None)
    assert seen == [((12, 2, 6, 8), (12, 2, 16, 8), (12, 2, 16, 8), (12, 1, 6, 16))], "4 blocks of 3 sequences"
