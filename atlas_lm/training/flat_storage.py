"""Tensors laid out side by side in memory, so that what looks at all of them takes few large steps."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ALIGNMENT = 64  # bytes, as torch's own allocations: kernels take the same way through either, bit for bit
LARGE = 2048  # bytes; a tensor of so many starts at a multiple of them, so that few rows of memory hold two tensors


@torch.no_grad()
def flat_storage(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that share one storage, by falling size; each starts where a tensor of its own could.

    Equally large ones lie at equal distances. Whoever saves or keeps one of them alone keeps all: clone it first.
    ValueError: the tensors are not dense, or not of one dtype and device.
    """
    tensors = list(tensors)
    for x in tensors:
        if (x.dtype, x.device) != (tensors[0].dtype, tensors[0].device):
            raise ValueError(f"{x.dtype} on {x.device} cannot lie beside {tensors[0].dtype} on {tensors[0].device}")
        if x.numel() and 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) != x.numel():
            raise ValueError(f"a tensor of shape {tuple(x.shape)} with strides {x.stride()} is not dense")
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].numel())
    starts, end = {}, 0
    for i in order:  # by falling size, so that the large ones all come first
        unit = (LARGE if tensors[i].nbytes >= LARGE else ALIGNMENT) // tensors[i].itemsize
        starts[i], end = end, end + -(-tensors[i].numel() // unit) * unit
    room = tensors[0].new_zeros(end) if tensors else torch.empty(0)
    copies = [room.as_strided(x.shape, x.stride(), starts[i]) for i, x in enumerate(tensors)]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x)
    return copies


@torch.no_grad()
def lay_side_by_side(module: nn.Module) -> None:
    """Move a module's parameters into one storage, where they are not in one and can be.

    A module that goes to a GPU leaves each of its parameters in a storage of its own. Sharded parameters stay as they
    are, and so do all where there is no memory for both: it costs speed alone.
    """
    parameters = list(module.parameters())
    if len({(p.dtype, p.device) for p in parameters}) != 1 or any(isinstance(p, DTensor) for p in parameters):
        return
    if len({p.untyped_storage().data_ptr() for p in parameters}) == 1:
        return
    with contextlib.suppress(torch.OutOfMemoryError):
        for parameter, copy in zip(parameters, flat_storage(parameters), strict=True):
            parameter.data = copy
