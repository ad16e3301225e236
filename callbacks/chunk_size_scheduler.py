"""Shrink the local memories' chunks while training continues (stage 2): fine resolution at the end, speed before.

Watches:  the optimizer step, nothing else: after a rollback the sizes are those of the step to which it went back.
Acts:     sets each local memory's chunk size at the beginning of a step.
Logs:     chunk_size_scheduler/chunk_size (the largest) at every step; a line for every change.
Requires: HasLocalChunks. Keeps the number of changes in the checkpoint.
Source:   TNT, stage 2; T2: C_L(t) = max(1, floor(C_start · γ^t)); T4.
"""

import logging
import math
from collections.abc import Sequence
from decimal import Context, Decimal
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.support.probing import log_number, record
from callbacks.support.ranges import at_least, check, one_of

log = logging.getLogger(__name__)
_EXACT = Context(prec=60)  # in floats 100 · 0.7² is 48.99…, and its floor 48
_TINY = Decimal("1e-30")  # for a derived γ, which is no short decimal


@runtime_checkable
class HasLocalChunks(Protocol):
    """All that this scheduler knows of the module."""

    @property
    def local_chunks(self) -> tuple[int, ...]:
        """Chunk size of each local memory, tokens."""
        ...

    def set_local_chunks(self, chunks: tuple[int, ...]) -> None:
        """Use these from now on."""
        ...


class ChunkSizeScheduler(Callback):
    """`schedule`: geometric (factor `gamma` per step), step (halves every `step_every` steps) or cosine (to `end`).

    `start`: tokens, for all local memories or one each. `gamma="auto"`: the largest reaches `end` at the last of
    `total_steps`. `transition_steps`: over so many steps a change is spread linearly (0: at once). ValueError: a value
    that makes no sense.
    """

    def __init__(
        self,
        start: int | Sequence[int],
        total_steps: int,
        schedule: str = "geometric",
        gamma: float | str = 0.9993,
        end: int = 1,
        step_every: int | None = None,
        transition_steps: int = 0,
    ) -> None:
        self.start = (start,) if isinstance(start, int) else tuple(int(size) for size in start)
        if not self.start:
            raise ValueError(
                "start=[] of chunk_size_scheduler: the model has no local memory whose chunks could shrink; leave the "
                "scheduler out (~callbacks.chunk_size_scheduler), or give the model one (model.local_chunks=[64])"
            )
        if min(self.start) < 1:
            raise ValueError(f"start={start} of chunk_size_scheduler must be chunk sizes of at least 1 token")
        check(
            "chunk_size_scheduler", total_steps=(total_steps, at_least(1)),
            schedule=(schedule, one_of("geometric", "step", "cosine")),
            transition_steps=(transition_steps, at_least(0, "which changes sizes at once")),
        )  # fmt: skip
        if gamma != "auto" and not (isinstance(gamma, float | int) and 0 < gamma <= 1):
            raise ValueError(f"gamma={gamma} of chunk_size_scheduler must be above 0 and at most 1, or auto")
        if not 1 <= end <= min(self.start):
            raise ValueError(f"end={end} must be at least 1 and at most the smallest start, {min(self.start)}")
        if (schedule == "step") != (step_every is not None) or (step_every is not None and step_every < 1):
            raise ValueError(f"step_every={step_every}: schedule=step, and no other, needs a number of at least 1")
        self.schedule, self.end, self.step_every, self.transition_steps = schedule, end, step_every, transition_steps
        self.last_step = max(1, total_steps - 1)
        self.gamma = Decimal(str(gamma)) if gamma != "auto" else self._derived_gamma()
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.transitions = 0
        self.sizes: tuple[int, ...] | None = None  # of the last step

    def _derived_gamma(self) -> Decimal:
        ratio = _EXACT.divide(Decimal(self.end), Decimal(max(self.start)))
        return _EXACT.power(ratio, _EXACT.divide(Decimal(1), Decimal(self.last_step)))

    def hard_size(self, start: int, step: int) -> int:
        """The size that began as `start`, at `step`, if every change happens at once."""
        if self.schedule == "step":
            assert self.step_every is not None
            return max(self.end, start >> (step // self.step_every))
        if self.schedule == "cosine":
            share = (1 + math.cos(math.pi * min(1.0, step / self.last_step))) / 2
            return math.floor(self.end + (start - self.end) * share + 1e-9)
        size = _EXACT.multiply(Decimal(start), _EXACT.power(self.gamma, step))
        return max(self.end, math.floor(_EXACT.add(size, _TINY)))

    def chunk_sizes(self, step: int) -> tuple[int, ...]:
        """One size per `start`, at optimizer step `step`.

        A mean over the last steps is linear after a change, and well defined where changes follow one another closely.
        """
        span = max(1, self.transition_steps)
        sums = (sum(self.hard_size(start, max(0, step - back)) for back in range(span)) for start in self.start)
        return tuple((2 * total + span) // (2 * span) for total in sums)  # rounded

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError: the module has no chunk sizes to set. ValueError: another number of them."""
        if stage == "fit":
            self.reset()
        if not isinstance(pl_module, HasLocalChunks):
            missing = [name for name in ("local_chunks", "set_local_chunks") if not hasattr(pl_module, name)]
            needs = f"chunk_size_scheduler needs {' and '.join(missing)}"
            raise TypeError(f"{needs}, which {type(pl_module).__name__} lacks")
        memories = len(pl_module.local_chunks)
        if memories == 0 or len(self.start) not in (1, memories):
            wrong = f"start={list(self.start)} of chunk_size_scheduler does not fit {memories} local memories"
            raise ValueError(f"{wrong}: give one size, or one each")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sizes of the first step; of a resumed run those of the last one, so that a change after it is seen."""
        assert isinstance(pl_module, HasLocalChunks)
        if self.sizes is None:
            self._apply(trainer, pl_module)
        elif tuple(pl_module.local_chunks) != self.sizes:
            pl_module.set_local_chunks(self.sizes)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sizes of this step. The step does not change within an accumulation window, and so neither do they."""
        if self._apply(trainer, pl_module):
            record(trainer, {"chunk_size_scheduler/chunk_size": self.largest()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log here: within one hook Lightning refuses a name that `record` uses too."""
        log_number(pl_module, "chunk_size_scheduler/chunk_size", self.largest())

    def largest(self) -> float:
        """Chunk size of the last step, tokens."""
        assert self.sizes
        return float(max(self.sizes))

    def _apply(self, trainer: Trainer, pl_module: Any) -> bool:
        """Whether the schedule has moved on since the last step."""
        step, sizes, before = trainer.global_step, self.chunk_sizes(trainer.global_step), self.sizes
        if len(sizes) == 1:
            sizes *= len(pl_module.local_chunks)
        if tuple(pl_module.local_chunks) != sizes:
            pl_module.set_local_chunks(sizes)
        self.sizes = sizes
        if before is None or before == sizes:
            return False
        self.transitions += 1
        if trainer.is_global_zero:
            log.info("step %d: local chunk sizes %s → %s", step, list(before), list(sizes))
        return True

    def state_dict(self) -> dict[str, Any]:
        """The number of changes and the sizes after the last."""
        return {"transitions": self.transitions, "sizes": None if self.sizes is None else list(self.sizes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        sizes = state_dict["sizes"]
        self.transitions, self.sizes = state_dict["transitions"], None if sizes is None else tuple(sizes)
