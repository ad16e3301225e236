"""What a text's prediction gains from beyond attention's reach, and from how far back: only the memory can give it.

Watches:  on held-out text, the loss of the last `block` tokens of each sequence with the memory's whole past, and with
          the memory restarted h tokens before them, for growing h: 0, 1, 2, 4, … attention windows, and the reach of
          all layers' windows together. Every `every_n_steps`.
Acts:     from `from_step` on, warns, or stops all ranks together (`on_failure: stop`), when the interval of the context
          gain is not above 0: the memory is there, and the text is predicted as well without its past. Before that it
          measures again, on `confirm_rows` sequences: a few cannot deny a small gain.
Logs:     memory_horizon/gain (nats per token: the loss with the memory restarted at attention's reach, less that with
          its whole past), memory_horizon/gain_low and memory_horizon/gain_high (95 % of a bootstrap over sequences),
          memory_horizon/horizon (tokens before the block that give 95 % of the gain; 0 where there is none),
          memory_horizon/step.
Requires: HasMemoryHorizon and a validation loader.
Source:   W1. The needle says that a memory can hold; this says that the model uses what it holds.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves

from callbacks.support.collectives import gathered
from callbacks.support.lightning_internals import accumulates
from callbacks.support.probing import held_out_batch, record, rows_of, undisturbed
from callbacks.support.ranges import at_least, check, one_of

log = logging.getLogger(__name__)

RESAMPLES = 2000
TAIL = 0.025  # on each side of the interval
SHARE = 0.95  # of the gain, that the horizon gives


@runtime_checkable
class HasMemoryHorizon(Protocol):
    """All that this probe knows of the module."""

    def attention_reach(self) -> tuple[int, int]:
        """Tokens of one attention window, and how many tokens back all layers' windows together reach."""
        ...

    def losses_after_restarts(self, batch: Any, distances: Sequence[int], block: int) -> Tensor:
        """Nats of each of the last `block` targets, (len(distances) + 1, rows, block), NaN where none is scored: with
        the memory restarted so many tokens before the block, and last of all with its whole past. Attention sees what
        it always sees. Changes nothing. ValueError: the sequences are too short."""
        ...


class MemoryUnused(RuntimeError):
    """The text is predicted as well without the memory's past."""


class Gain(NamedTuple):
    """What the memory gives from beyond attention's reach."""

    mean: float  # nats per token
    low: float
    high: float
    horizon: float  # tokens before the block


def distances(window: int, reach: int, context: int) -> list[int]:
    """Where the memory is restarted, tokens before the block, of which there are `context`: 0, windows doubling up to
    the reach, the reach, and its doublings. ValueError: nothing lies beyond the reach."""
    if not 0 < reach < context:
        raise ValueError(
            f"{context} tokens lie before the block and attention reaches {reach}: nothing of the text is for the "
            "memory alone, use longer sequences or shorter windows"
        )
    found, h = [0], window
    while h < reach:
        found.append(h)
        h *= 2
    h = reach
    while h < context:
        found.append(h)
        h *= 2
    return found


def estimate(losses: Tensor, restarts: Sequence[int], reach: int, seed: int = 0) -> Gain:
    """From nats (len(restarts) + 1, rows, block), NaN where not scored, as `losses_after_restarts` gives them.

    The mean is over all scored tokens; the interval resamples whole sequences, whose tokens are not independent.
    """
    differences = losses[:-1].double() - losses[-1].double()
    scored = ~differences[0].isnan()
    sums, counts = torch.where(scored, differences, 0.0).sum(2), scored.sum(1).double()
    sums, counts = sums[:, counts > 0], counts[counts > 0]  # (restarts, rows), (rows,)
    if not counts.numel():
        return Gain(math.nan, math.nan, math.nan, math.nan)
    means = sums.sum(1) / counts.sum()
    beyond = list(restarts).index(reach)
    drawn = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=torch.Generator().manual_seed(seed))
    samples = sums[beyond][drawn].sum(1) / counts[drawn].sum(1)
    low, high = samples.quantile(torch.tensor([TAIL, 1 - TAIL], dtype=torch.double)).tolist()
    gain = float(means[beyond])
    return Gain(gain, low, high, _horizon(means.tolist()[beyond:], list(restarts)[beyond:], gain) if gain > 0 else 0.0)


def _horizon(losses: list[float], restarts: list[int], gain: float) -> float:
    """The distance from which on no more than the rest of the gain is missing; straight lines between the points."""
    rest = (1 - SHARE) * gain
    missing = [i for i, loss in enumerate(losses) if not loss <= rest]
    last = missing[-1] if missing else 0
    if last + 1 == len(losses):
        return float(restarts[last])  # at least: the sequences are no longer
    share = (losses[last] - rest) / (losses[last] - losses[last + 1])
    return restarts[last] + share * (restarts[last + 1] - restarts[last])


class MemoryHorizon(Callback):
    """Measures on `rows` held-out sequences per rank, and on `confirm_rows` before it warns or stops; keeps no state.

    `block`: tokens at the end of each sequence whose loss is compared; None: one attention window. `from_step`:
    optimizer step from which on a gain is expected. ValueError: a value out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 2000,
        rows: int = 8,
        block: int | None = None,
        from_step: int = 1000,
        on_failure: str = "warn",
        confirm_rows: int = 64,
    ) -> None:
        check(
            "memory_horizon", every_n_steps=(every_n_steps, at_least(1)), rows=(rows, at_least(2, "to resample")),
            block=(1 if block is None else block, at_least(1)), from_step=(from_step, at_least(0)),
            on_failure=(on_failure, one_of("warn", "stop")), confirm_rows=(confirm_rows, at_least(0)),
        )  # fmt: skip
        self.every_n_steps, self.rows, self.block = every_n_steps, rows, block
        self.from_step, self.on_failure, self.confirm_rows = from_step, on_failure, confirm_rows
        self._batch: Any = None
        self._more: Any = None

    # The judgement

    estimate = staticmethod(estimate)  # the exit gate `used` asks with more text

    def judge(self, gain: Gain, step: int) -> str | None:
        """What is wrong, in words; None if nothing is, or if it is too early to say."""
        found = f"{gain.mean:+.4f} nats per token ({gain.low:+.4f} to {gain.high:+.4f})"
        if not all(math.isfinite(value) for value in gain[:3]):
            return f"memory horizon at step {step}: the gain is {found}: the model's losses are not finite"
        if step < self.from_step or gain.low > 0:
            return None
        return (
            f"the memory is not used: at step {step} its past beyond attention's reach is worth {found}: a text that "
            "rewards context, longer sequences or another memory are needed, or none"
        )

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError if the module cannot restart its memory."""
        if not isinstance(pl_module, HasMemoryHorizon):
            raise TypeError(
                "memory_horizon needs attention_reach() and losses_after_restarts(...), which "
                f"{type(pl_module).__name__} lacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the text."""
        self._batch = held_out_batch(trainer, self.rows, "memory_horizon")
        more = held_out_batch(trainer, max(self.rows, self.confirm_rows), "memory_horizon", fewer=True)
        most = max(gathered(trainer, rows_of(more) - rows_of(self._batch)))
        self._more = more if most > 0 else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time."""
        if self._batch is None or accumulates(trainer) or trainer.global_step % self.every_n_steps:
            return
        try:
            gain = self.measure(trainer, pl_module)
        except ValueError as error:  # on all ranks alike: it is about lengths
            self._batch = None
            if trainer.is_global_zero:
                log.warning("memory_horizon is not measured: %s", error)
            return
        step = trainer.global_step
        if self._more is not None and math.isfinite(gain.mean) and self.judge(gain, step):
            gain = self._confirm(trainer, pl_module, gain)
        values = {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high, "horizon": gain.horizon}
        record(trainer, {f"memory_horizon/{name}": value for name, value in values.items()})
        record(trainer, {"memory_horizon/step": step})
        wrong = self.judge(gain, step)
        if wrong and self.on_failure == "stop":
            raise MemoryUnused(wrong)
        if wrong and trainer.is_global_zero:
            log.warning(wrong)

    def _confirm(self, trainer: Trainer, pl_module: Any, first: Gain) -> Gain:
        """The gain on more text; how far back it comes from is known well enough."""
        with undisturbed(trainer, pl_module):
            window, reach = pl_module.attention_reach()
            block = min(window if self.block is None else self.block, next(len(x[0]) for x in _tensors(self._more)))
            losses = pl_module.losses_after_restarts(self._more, [reach], block).float()
        found = estimate(torch.cat(gathered(trainer, losses.cpu()), dim=1), [reach], reach)
        return found._replace(horizon=first.horizon if found.mean > 0 else 0.0)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> Gain:
        """Over the sequences of all ranks."""
        with undisturbed(trainer, pl_module):
            losses, restarts, reach = self.losses(pl_module, self._batch)
        everywhere = gathered(trainer, losses.cpu())
        return estimate(torch.cat(everywhere, dim=1), restarts, reach)

    def losses(self, pl_module: Any, batch: Any) -> tuple[Tensor, list[int], int]:
        """What `estimate` takes, of a batch whose tensors are (rows, tokens)."""
        window, reach = pl_module.attention_reach()
        tokens = next(len(x[0]) for x in _tensors(batch))
        block = min(window if self.block is None else self.block, tokens)
        restarts = distances(window, reach, tokens - block)
        return pl_module.losses_after_restarts(batch, restarts, block).float(), restarts, reach


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() >= 2]
