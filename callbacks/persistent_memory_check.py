"""Check that all ranks hold the same persistent memory, and that a resumed run holds the one that was saved.

Watches:  the SHA-256 of the persistent memory's bytes, before training and whenever a checkpoint is written.
Acts:     raises PersistentMemoryDiffers on all ranks, before step 0.
Logs:     nothing; the first digits are logged.
Requires: HasPersistentMemory. Keeps the hash in the checkpoint.
Source:   C7.
"""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.support.collectives import gathered

log = logging.getLogger(__name__)


@runtime_checkable
class HasPersistentMemory(Protocol):
    """All that this check knows of the module."""

    def persistent_memory(self) -> list[Tensor]:
        """The persistent memory of every layer; called on all ranks, as it may be sharded."""
        ...


class PersistentMemoryDiffers(ValueError):
    """Ranks, or a checkpoint and what was loaded from it, disagree."""


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the bytes of whole tensors, hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class PersistentMemoryCheck(Callback):
    """Compares hashes once, as training starts."""

    def __init__(self) -> None:
        self.saved: str | None = None  # of the checkpoint that this run resumes
        self._module: HasPersistentMemory | None = None

    def judge(self, hashes: list[str], saved: str | None) -> None:
        """Raise unless all ranks' hashes are the same, and the saved one if there is one."""
        others = [f"rank {rank} {found}" for rank, found in enumerate(hashes) if found != hashes[0]]
        if others:
            raise PersistentMemoryDiffers(
                f"the persistent memory differs between ranks: rank 0 {hashes[0]}, {', '.join(others)}: "
                "start all ranks with the same seed and from the same checkpoint"
            )
        if saved not in (None, hashes[0]):
            raise PersistentMemoryDiffers(
                f"the persistent memory was saved as {saved} and loaded as {hashes[0]}: the checkpoint is not the one "
                "that was written; resume another one"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError: the module shows no persistent memory."""
        if not isinstance(pl_module, HasPersistentMemory):
            raise TypeError(
                f"persistent_memory_check needs persistent_memory(), which {type(pl_module).__name__} lacks"
            )
        self._module, self.saved = pl_module, None  # a resumed state is loaded after this hook

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare. ValueError: there is nothing to compare."""
        assert self._module is not None
        memory = self._module.persistent_memory()
        if not memory:
            raise ValueError(
                "persistent_memory_check: this model has no persistent memory: remove the check with "
                "~callbacks.persistent_memory_check"
            )
        hashes = gathered(trainer, digest(memory))
        self.judge(hashes, self.saved)
        self.saved = None
        if trainer.is_global_zero:
            log.info("persistent memory %s on %d rank(s)", hashes[0][:12], len(hashes))

    def state_dict(self) -> dict[str, Any]:
        """The hash as it is now, which is when a checkpoint is written; Lightning calls this on all ranks."""
        return {} if self._module is None else {"sha256": digest(self._module.persistent_memory())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the checkpoint says about itself."""
        self.saved = state_dict["sha256"]
