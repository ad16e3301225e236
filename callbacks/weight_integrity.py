"""Notice weights and optimizer state that change outside the optimizer: a flipped bit, a stray write.

Watches:  one 64-bit sum over the bits of each parameter and of each tensor of the optimizer's state, from the end of an
          optimizer step to the moment before the next: forward, backward, validation, all that lies between. Not the
          buffers, which modules may change in forward (BatchNorm). Any single changed bit changes the sum.
Acts:     drops the gradients on all ranks together, warns with ranks and names, and requests a rollback of the first
          callback that can (`CanRollBack`). Without one, or if the damage is still there at the next step, raises
          WeightsCorrupted on all ranks.
Logs:     weight_integrity/corruptions, when it grows.
Requires: a LightningModule with automatic optimization. The sums and the count travel in the checkpoint and in the
          snapshots of a rollback, so that restored weights are compared with the sums of their own time; a new fit
          begins with new sums.
Source:   silent data corruption strikes without NaN: no safeguard that looks at values or losses sees a small one.
"""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.support.collectives import gathered
from callbacks.support.fingerprint import BitSums, Fingerprint
from callbacks.support.lightning_internals import accumulates
from callbacks.support.probing import record, reshard
from callbacks.support.rollback_request import who_can_roll_back
from callbacks.support.step_vote import enter, vote

log = logging.getLogger(__name__)

SHOWN = 5  # names in a message


class WeightsCorrupted(RuntimeError):
    """Weights or optimizer state differ from what the optimizer left."""


class WeightIntegrity(Callback):
    """Compares the sums after each optimizer step with those before the next."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.corruptions = 0  # steps at which some were found, rolled back ones included
        self._expected: Fingerprint | dict[str, int] | None = None  # None: within an optimizer step
        self._found: Fingerprint | None = None  # of this step, until it has been judged
        self._requested: int | None = None  # step at which a rollback was requested that has not come yet
        self._parameters: dict[str, Tensor] = {}
        self._sums = BitSums()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError: the module takes its optimizer steps by itself."""
        if stage == "fit":
            self.reset()
        if not pl_module.automatic_optimization:
            raise TypeError(
                f"weight_integrity cannot know when {type(pl_module).__name__}, which takes its optimizer steps by "
                "itself, changes its weights"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The state that training starts from."""
        reshard(pl_module)  # gathered parameters are others than those that training keeps
        self._parameters, self._requested = dict(pl_module.named_parameters()), None
        self._expected = self._fingerprint(trainer)
        enter(trainer, weight_integrity=self._differs)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare, before the optimizer makes the damage its own."""
        if self._expected is None:
            return
        if vote(trainer, pl_module, "weight_integrity"):
            assert self._found is not None
            self._act(trainer, optimizer, gathered(trainer, self._compare(self._expected, self._found)))
        else:
            self._expected = None
        self._found = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The state that the optimizer has left; while a rollback is due, the sums stay those before the damage."""
        if self._requested is None and not accumulates(trainer):
            self._expected = self._fingerprint(trainer)

    def judge(self, expected: dict[str, int], found: dict[str, int]) -> list[str]:
        """Names of what changed. An optimizer may make its state at any time: new tensors are not judged."""
        return [name for name, value in found.items() if expected.get(name, value) != value]

    def _act(self, trainer: Trainer, optimizer: Optimizer, wrong: list[list[str]]) -> None:
        """On all ranks, of which at least one found something wrong."""
        optimizer.zero_grad(set_to_none=True)  # weights and moments stay as they are
        self.corruptions += 1
        record(trainer, {"weight_integrity/corruptions": self.corruptions})
        step = trainer.global_step
        reason = f"weights changed outside the optimizer before step {step}"
        found = f"{reason}: {'; '.join(_by_rank(wrong))}"
        if trainer.is_global_zero:
            log.warning("%s", found)
        able = who_can_roll_back(trainer)
        if able is None or self._requested is not None:
            failed = "" if able is None else f" (the rollback requested at step {self._requested} did not repair them)"
            raise WeightsCorrupted(
                f"{found}{failed}: resume the last checkpoint; if it happens again on the same machine, its memory is "
                "bad"
            )
        self._requested = step
        able.request_rollback(reason)

    # State that survives a resume

    def state_dict(self) -> dict[str, Any]:
        """The count, and the sums of this very moment."""
        return {
            "corruptions": self.corruptions,
            "sums": self._expected.numbers() if isinstance(self._expected, Fingerprint) else self._expected,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a snapshot or a checkpoint: its sums, but never a smaller count, as a rollback undoes no corruption."""
        self.corruptions = max(self.corruptions, state_dict["corruptions"])
        self._expected, self._requested = state_dict["sums"], None
        self._sums = BitSums()  # its views would keep the moments that are being replaced alive for another step

    def after_restored_file(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The file has the sums of rank zero; where weights are sharded, each rank has others. It may have none."""
        self._requested, self._sums = None, BitSums()
        self._expected = self._fingerprint(trainer)

    # Parts

    def _differs(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | float:
        """Whether anything has changed; on the device, where the sums are."""
        if self._expected is None:
            return 0.0
        self._found = self._fingerprint(trainer)
        if isinstance(self._expected, Fingerprint) and self._expected.views is self._found.views:
            return self._expected.differs(self._found)
        return float(bool(self._compare(self._expected, self._found)))

    def _compare(self, expected: Fingerprint | dict[str, int], found: Fingerprint) -> list[str]:
        if isinstance(expected, Fingerprint):
            if expected.equals(found):
                return []
            expected = expected.numbers()
        return self.judge(expected, found.numbers())

    def _fingerprint(self, trainer: Trainer) -> Fingerprint:
        """Of the parameters, and of what optimizers keep of them."""
        states = [value for o in trainer.optimizers for state in _states(o) for value in state.values()]
        tensors = [value for value in states if isinstance(value, Tensor)]
        return self._sums([*self._parameters.values(), *tensors], lambda: self._names(trainer))

    def _names(self, trainer: Trainer) -> list[str]:
        """Independent of the order of an optimizer's state, which a rollback may change."""
        of = {id(parameter): name for name, parameter in self._parameters.items()}
        return [*self._parameters] + [
            f"{of.get(id(key), 'state of no parameter')} ({name})"
            for optimizer in trainer.optimizers
            for key, state in zip(optimizer.state, _states(optimizer), strict=True)
            for name, value in state.items()
            if isinstance(value, Tensor)
        ]


def _states(optimizer: Optimizer) -> list[dict[str, Any]]:
    """One per key of its state; some optimizers keep there also what is of no parameter, and no dictionary."""
    return [state if isinstance(state, dict) else {} for state in optimizer.state.values()]


def _by_rank(wrong: list[list[str]]) -> list[str]:
    """For each rank that found something: what."""
    return [
        f"rank {rank}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for rank, names in enumerate(wrong)
        if names
    ]
