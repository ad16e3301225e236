"""Random numbers continue where a checkpoint was written: a resumed run draws what the whole run would have drawn.

Watches:  the generators of Python, NumPy and PyTorch (CPU, and CUDA where it is in use), of every rank.
Acts:     keeps their states in each checkpoint, and sets them when a run is resumed or rolled back.
Logs:     a warning where a run is resumed on another number of ranks: no states fit those, the seed's are kept.
Requires: any LightningModule.
"""

import logging
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.support.collectives import gathered

log = logging.getLogger(__name__)

KEY = "random_state"


def states() -> dict[str, Any]:
    """Of this process, as tensors and plain containers: a checkpoint is read without running code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 – of whoever draws from it
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_states(saved: dict[str, Any]) -> None:
    """Draw on from `saved`."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(saved["torch"].cpu())
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"].cpu())


class RandomState(Callback):
    """Exact as long as the number of ranks stays."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self._training = False
        self._pending: dict[str, Any] | None = None  # states to continue from, until the first batch is there

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Those of all ranks; rank zero writes the file."""
        checkpoint[KEY] = gathered(trainer, states())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of a resumed run before its setup is over; of a rollback in the middle of training, where it counts now."""
        saved = checkpoint.get(KEY)
        if saved is None:
            return
        if len(saved) != trainer.world_size:
            if trainer.is_global_zero:
                log.warning(
                    "random numbers of %d rank(s) were saved and there are %d now: they start from the seed",
                    len(saved), trainer.world_size,
                )  # fmt: skip
            return
        mine = saved[trainer.global_rank]
        if self._training:
            set_states(mine)
        else:
            self._pending = mine

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Training has not begun."""
        if stage == "fit":
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A loader draws a seed for its workers when an epoch begins: from the same state as in the whole run."""
        self._training = True
        if self._pending is not None:
            set_states(self._pending)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """In the middle of an epoch the whole run drew no such seed: once more from the saved state."""
        if self._pending is not None and batch_idx > 0:
            set_states(self._pending)
        self._pending = None
