"""Stop the run when ranks no longer hold the same weights: from then on each trains a model of its own.

Watches:  a 64-bit sum over the bits of every parameter and buffer that all ranks should hold alike: as training starts,
          every `every_n_steps`, and as it ends. Shards differ rightly and are left out; so is a buffer that has changed
          on all ranks since the last check and differs (BatchNorm's statistics are each rank's own).
Acts:     raises RanksDiverged on all ranks together, before a checkpoint of that step is written. Checkpoints written
          after the last step at which all agreed are suspect: let the interval divide those of the checkpoints.
Logs:     nothing; with nothing to compare, a line says so.
Requires: any LightningModule.
Source:   data-parallel training assumes it and never looks: one flipped bit, or one rank's own random number, and the
          averaged gradients fit no rank any more.
"""

import logging
from collections import Counter
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.support.collectives import gathered
from callbacks.support.fingerprint import BitSums
from callbacks.support.lightning_internals import accumulates
from callbacks.support.ranges import at_least, check

log = logging.getLogger(__name__)


class RanksDiverged(RuntimeError):
    """Ranks hold different weights."""


class RankState(NamedTuple):
    """What one rank holds: a number per tensor."""

    parameters: dict[str, int]
    buffers: dict[str, int]
    changed: dict[str, bool]  # buffers, since the last check


def replicated(trainer: Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that every rank should hold alike."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):  # their shards are plain tensors
        return {}
    return {
        name: x for name, x in tensors.items()
        if not isinstance(x, DTensor) or all(placement.is_replicate() for placement in x.placements)
    }  # fmt: skip


class RankAgreement(Callback):
    """Compares every `every_n_steps` optimizer steps. ValueError: below 1."""

    def __init__(self, every_n_steps: int = 100) -> None:
        check("rank_agreement", every_n_steps=(every_n_steps, at_least(1)))
        self.every_n_steps = every_n_steps
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.agreed: int | None = None  # last step at which all ranks held the same
        self._buffers: dict[str, int] = {}  # at the last check
        self._sums = BitSums()

    # The judgement

    def judge(self, states: list[RankState], step: int) -> None:
        """Raise unless all ranks hold the same."""
        own = {name for name in states[0].buffers if all(state.changed.get(name, False) for state in states)}
        held = [
            {**state.parameters, **{name: x for name, x in state.buffers.items() if name not in own}}
            for state in states
        ]
        kinds = [tuple(sorted(one.items())) for one in held]
        common, count = Counter(kinds).most_common(1)[0]
        if count == len(kinds):
            self.agreed = step
            return
        majority = 2 * count > len(kinds)
        reference = held[kinds.index(common)] if majority else held[0]
        others = [
            f"rank {rank} (first in {next((n for n in reference if one.get(n) != reference[n]), 'their names')})"
            for rank, one in enumerate(held)
            if one != reference
        ]
        since = "never in this run" if self.agreed is None else f"at step {self.agreed}"
        remedy = (
            "start all ranks with the same seed and from the same checkpoint"
            if self.agreed is None
            else f"resume a checkpoint of step {self.agreed} or earlier, later ones are suspect"
        )
        raise RanksDiverged(
            f"at step {step} {', '.join(others)} differ{'s' if len(others) == 1 else ''} from "
            f"{'the majority' if majority else 'rank 0'}; all ranks agreed last {since}: {remedy}"
        )

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start clean."""
        if stage == "fit":
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what training starts from, also where it continues."""
        self.agreed, self._buffers = None, {}
        if trainer.world_size > 1:
            if not self._replicated(trainer, pl_module) and trainer.is_global_zero:
                log.info("rank_agreement: every parameter and buffer is sharded, there is nothing to compare")
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare if it is time, between two optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0 and not accumulates(trainer):
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what the last checkpoint will hold."""
        if self.agreed != trainer.global_step:
            self._look(trainer, pl_module)

    # Parts

    def _replicated(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        return replicated(trainer, {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())})

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, on all ranks; at nothing where there is but one rank, or nothing that they share."""
        shared = self._replicated(trainer, pl_module) if trainer.world_size > 1 else {}
        if not shared:
            return
        found = self._sums([x.detach() for x in shared.values()], lambda: list(shared)).numbers()
        buffers = {name: found[name] for name, _ in pl_module.named_buffers() if name in found}
        changed = {name: self._buffers.get(name, value) != value for name, value in buffers.items()}
        parameters = {name: value for name, value in found.items() if name not in buffers}
        self._buffers = buffers
        self.judge(gathered(trainer, RankState(parameters, buffers, changed)), trainer.global_step)
