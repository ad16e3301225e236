"""Tensors laid out side by side in memory, so that what looks at all of them takes few large steps."""

from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch's own allocations: kernels take the same way through either, bit for bit


@torch.no_grad()
def side_by_side(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that share one storage, by falling size; each starts where a tensor of its own could.

    Equally large ones lie at equal distances. The tensors share dtype and device, and are dense.
    """
    tensors = list(tensors)
    unit = ALIGNMENT // tensors[0].itemsize if tensors else 1
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].numel())
    starts, end = {}, 0
    for i in order:
        starts[i], end = end, end + -(-tensors[i].numel() // unit) * unit
    room = tensors[0].new_zeros(end) if tensors else torch.empty(0)
    copies = [room.as_strided(x.shape, x.stride(), starts[i]) for i, x in enumerate(tensors)]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x)
    return copies
