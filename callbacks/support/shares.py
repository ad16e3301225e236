"""What all ranks hold alike, kept once per job: each rank keeps a share of every large tensor."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils._pytree import tree_map

from callbacks.support.collectives import parts_of_ranks

SMALLEST = 256  # numbers; smaller tensors are kept whole


class Share:
    """This rank's part of a tensor, in main memory; a leaf of a tree."""

    def __init__(self, whole: Tensor, rank: int, ranks: int) -> None:
        self.shape, count = whole.shape, -(-whole.numel() // ranks)
        mine = whole.detach().reshape(-1)[rank * count : (rank + 1) * count]
        self.part = mine.new_zeros(count, device="cpu")  # as long on every rank
        self.part[: mine.numel()] = mine.cpu()

    def whole(self, trainer: Trainer) -> Tensor:
        """The tensor, in main memory; to be called on every rank."""
        return torch.cat(parts_of_ranks(trainer, self.part))[: self.shape.numel()].view(self.shape)


def is_replicated(trainer: Trainer) -> bool:
    """Whether several ranks hold the same weights and the same optimizer state."""
    return trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy)


def in_main_memory(x: Any) -> Any:
    """A copy there, if it is a tensor."""
    return x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x


def shared(trainer: Trainer, tree: Any) -> Any:
    """Every tensor of nested containers, all alike on all ranks, as this rank's share; small ones are copied whole."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.numel() < SMALLEST:
            return in_main_memory(x)
        return Share(x, trainer.global_rank, trainer.world_size)

    return tree_map(leaf, tree)


def joined(trainer: Trainer, tree: Any) -> Any:
    """The inverse of `shared`; to be called on every rank. A tree without shares comes back as it is."""
    return tree_map(lambda x: x.whole(trainer) if isinstance(x, Share) else x, tree)
