"""What the memory's branch is worth to the text: held-out perplexity with it, and with its output zeroed. A number.

Watches:  the loss at positions that attention cannot fully see, with and without the memory, every `every_n_steps`.
Acts:     not at all: a network without a branch that it was trained with does worse, whatever the branch remembers.
          Whether the memory is used, `memory_horizon` judges.
Logs:     memory_contribution/perplexity_rise: the share by which the perplexity rises without the memory; 0.2 is 20 %.
          memory_contribution/step: the optimizer step at which that was measured.
Requires: HasMemoryContribution and a validation loader.
Source:   C1b.
"""

import logging
import math
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.support.collectives import mean_over_ranks
from callbacks.support.lightning_internals import accumulates
from callbacks.support.probing import held_out_batch, record, record_start, undisturbed
from callbacks.support.ranges import at_least, check

log = logging.getLogger(__name__)


@runtime_checkable
class HasMemoryContribution(Protocol):
    """All that this probe knows of the module."""

    def memory_contribution(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Mean nats per target with the memory and with its output zeroed; changes nothing.

        ValueError: the text is too short for the memory to matter.
        """
        ...


class MemoryContribution(Callback):
    """Measures on `rows` held-out sequences per rank; keeps no state. ValueError: a value out of its range."""

    def __init__(self, every_n_steps: int = 1000, rows: int = 2) -> None:
        check("memory_contribution", every_n_steps=(every_n_steps, at_least(1)), rows=(rows, at_least(1)))
        self.every_n_steps, self.rows = every_n_steps, rows
        self._batch: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError if the module cannot silence its memory."""
        if not isinstance(pl_module, HasMemoryContribution):
            raise TypeError(
                f"memory_contribution needs memory_contribution(batch), which {type(pl_module).__name__} lacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the text, and find out now whether it is long enough: if not, say so and measure nothing."""
        self._batch = held_out_batch(trainer, self.rows, "memory_contribution")
        try:
            gain = self.measure(trainer, pl_module)
        except ValueError as error:
            self._batch = None
            if trainer.is_global_zero:
                log.warning("memory_contribution/perplexity_rise is not measured: %s", error)
            return
        record_start(trainer, self._values(gain, trainer.global_step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time."""
        if self._batch is None or accumulates(trainer) or trainer.global_step % self.every_n_steps:
            return
        record(trainer, self._values(self.measure(trainer, pl_module), trainer.global_step))

    def _values(self, gain: float, step: int) -> dict[str, float]:
        return {"memory_contribution/perplexity_rise": gain, "memory_contribution/step": step}

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Relative rise of the perplexity when the memory's output is zeroed, over all ranks."""
        assert isinstance(pl_module, HasMemoryContribution)
        with undisturbed(trainer, pl_module):
            with_memory, without = pl_module.memory_contribution(self._batch)
        losses = mean_over_ranks(trainer, torch.stack([with_memory, without]).float())
        rise = float(losses[1] - losses[0])
        return math.expm1(rise) if rise < 700 else math.inf
