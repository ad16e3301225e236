"""Clip gradients at a threshold that follows the local chunk size, and harder while that changes.

Watches:  the local chunk sizes at each step; the gradient's norm before clipping.
Acts:     sets the Trainer's clip threshold of this very step to κ_base · sqrt(32 / C_L), C_L the largest local chunk;
          `transition_factor` of it in the step in which any size changed and the `transition_steps` − 1 after it.
Logs:     optim/clip_threshold, proactive_clipping/transitions, proactive_clipping/clips at every step.
Requires: HasLocalChunks; with HasGradientNorm it takes less time. Keeps sizes, the distance to their change and counts
          in the checkpoint.
Source:   C5.
"""

import math
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from callbacks.support.gradients import gradients
from callbacks.support.probing import log_number
from callbacks.support.ranges import above, at_least, check, share
from callbacks.support.step_vote import enter, norm_of_gradients, vote


@runtime_checkable
class HasLocalChunks(Protocol):
    """All that this callback knows of the module."""

    @property
    def local_chunks(self) -> tuple[int, ...]:
        """Chunk size of each local memory, tokens."""
        ...


class ProactiveClipping(Callback):
    """`kappa_base`: the threshold at `reference_chunk` tokens. ValueError: a value that makes no sense."""

    def __init__(
        self,
        kappa_base: float = 0.5,
        reference_chunk: int = 32,
        transition_steps: int = 10,
        transition_factor: float = 0.5,
    ) -> None:
        check(
            "proactive_clipping", kappa_base=(kappa_base, above(0, "to clip nothing, remove the callback")),
            reference_chunk=(reference_chunk, at_least(1)), transition_factor=(transition_factor, share()),
            transition_steps=(transition_steps, at_least(0, "which ignores changes")),
        )  # fmt: skip
        self.kappa_base, self.reference_chunk = kappa_base, reference_chunk
        self.transition_steps, self.transition_factor = transition_steps, transition_factor
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.chunks: tuple[int, ...] | None = None  # of the last step
        self.since_change = self.transition_steps  # steps; a run does not begin with a change
        self.transitions = self.clips = 0

    def threshold(self, chunk: int) -> float:
        """κ at chunk size `chunk`, away from changes: the smaller the chunk, the more the gradient may move."""
        return self.kappa_base * math.sqrt(self.reference_chunk / chunk)

    def at_step(self, chunks: tuple[int, ...]) -> float:
        """κ of the next step, in which the local memories use `chunks`; counts changes.

        There is one threshold for several memories: that of the largest chunk, which is the lowest and most cautious.
        """
        if self.chunks not in (None, chunks):
            self.transitions += 1
            self.since_change = 0
        self.chunks = chunks
        soft = self.since_change < self.transition_steps
        self.since_change = min(self.since_change + 1, self.transition_steps)
        return self.threshold(max(chunks)) * (self.transition_factor if soft else 1.0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError: the module has no `local_chunks`. ValueError: it has no local memory."""
        if stage == "fit":
            self.reset()
        if not isinstance(pl_module, HasLocalChunks):
            raise TypeError(f"proactive_clipping needs local_chunks, which {type(pl_module).__name__} lacks")
        if not pl_module.local_chunks:
            raise ValueError(
                "proactive_clipping: no local memory to follow: remove it with ~callbacks.proactive_clipping"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The norm is one of the numbers that are read once a step."""
        enter(trainer, gradient_norm=norm_of_gradients)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Lightning reads the threshold after this hook."""
        assert isinstance(pl_module, HasLocalChunks)
        kappa = self.at_step(tuple(pl_module.local_chunks))
        trainer.gradient_clip_val = kappa
        trainer.gradient_clip_algorithm = "norm"  # type: ignore[assignment]
        clips = vote(trainer, pl_module, "gradient_norm") > kappa
        self.clips += clips and bool(gradients(optimizer))  # a guard may have dropped them
        log_number(pl_module, "optim/clip_threshold", kappa)
        log_number(pl_module, "proactive_clipping/transitions", self.transitions)
        log_number(pl_module, "proactive_clipping/clips", self.clips)

    def state_dict(self) -> dict[str, Any]:
        """Where the last change is, and the counts."""
        return {
            "chunks": None if self.chunks is None else list(self.chunks),
            "since_change": self.since_change,
            "transitions": self.transitions,
            "clips": self.clips,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        chunks = state_dict["chunks"]
        self.chunks = None if chunks is None else tuple(chunks)
        self.since_change = state_dict["since_change"]
        self.transitions, self.clips = state_dict["transitions"], state_dict["clips"]
