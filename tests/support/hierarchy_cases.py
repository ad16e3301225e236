"""Small hierarchies of every kind, their inputs, and the properties that every memory layer must have (M17)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.fast_memory import FastMemory, MemorySpec
from atlas_lm.memory.hierarchy import Hierarchy, HierarchyState

# chunks that divide neither each other nor the shard; a shard that divides none of the lengths
SPEC = MemorySpec(
    dim=6, heads=2, head_dim=4, local_chunks=(3, 7), global_chunk=8, shard=24, rank=6, hidden=5, persistent_keys=3
)
LENGTHS = (1, 7, 63, 100)


class Inputs(NamedTuple):
    """What a hierarchy takes of T tokens: x (B, T, M); q, k, v (B, H, T, D)."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def cut(self, start: int, end: int) -> Inputs:
        return Inputs(self.x[:, start:end], *(y[:, :, start:end] for y in self[1:]))

    def changed(self, t: int) -> Inputs:
        """Another token t."""
        other = make_inputs(self.x.size(1), seed=77, dtype=self.x.dtype)
        here = torch.arange(self.x.size(1)) == t
        pick = (here[:, None] for _ in self)
        return Inputs(*(torch.where(p, b, a) for p, a, b in zip(pick, self, other, strict=True)))


def make_inputs(T: int, seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(1000 * seed + T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = (nnf.normalize(normal(batch, SPEC.heads, T, SPEC.head_dim), dim=-1) for _ in range(2))
    return Inputs(normal(batch, T, SPEC.dim), q, k, normal(batch, SPEC.heads, T, SPEC.head_dim))


def make_hierarchy(spec: MemorySpec = SPEC, dtype: torch.dtype = torch.float64) -> Hierarchy:
    """Gates that depend on their input; W_init as it comes."""
    torch.manual_seed(0)
    hierarchy = Hierarchy(spec)
    for module in hierarchy.modules():
        if isinstance(module, FastMemory):
            nn.init.normal_(module.gates.weight, std=0.5)
    return hierarchy.to(dtype)


def stream(hierarchy: Hierarchy, inputs: Inputs, ends: list[int]) -> tuple[Tensor, list[HierarchyState]]:
    """Outputs, and the states after each piece, of a stream given in pieces that stop at `ends`."""
    state, states, outputs = hierarchy.initial_state(inputs.x.size(0)), [], []
    for start, end in zip([0, *ends], ends, strict=False):
        y, state = hierarchy(*inputs.cut(start, end), state)
        states.append(state)
        outputs.append(y)
    return torch.cat(outputs, dim=2), states


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def size_of(state: Any) -> int:
    """Bytes of a state as it would be saved."""
    return sum(x.numel() * x.element_size() for x in tensors(state))


def held_by(state: Any) -> int:
    """Bytes that a state keeps alive: a view counts with all that it is a view of."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(state)}
    return sum(storages.values())


def everything_in(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, saved or not."""
    return {name: x.detach().clone() for name, x in [*module.named_parameters(), *module.named_buffers()]}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = everything_in(module)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
