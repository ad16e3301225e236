"""Does a next-vector predictor still predict what comes next, or has it turned to what was? The mini test of 5CAT.

Watches:  after each validation, on `samples` held-out rows: the mean cosine of the predictions with the frames around
          them, by offset; +1 is the target, 0 the last frame seen.
Acts:     drift is a peak elsewhere than at +1 and a margin of +1 that is not above 0, over the offsets of `among`. From
          epoch `from_epoch` on it takes the weights of all auxiliary losses to 0 until a test finds none (`back_off`),
          stops all ranks together (`stop`), or says so alone (`observe`).
Logs:     five_cat_probe/cosine, five_cat_probe/peak and five_cat_probe/margin (over the offsets of `among`),
          five_cat_probe/peak_seen and five_cat_probe/margin_seen (over −3 … +3), five_cat_probe/drift (0 or 1).
Requires: HasOffsetCosines, a validation loader; HasLossWeights where it backs off. Comes after loss_weight_schedule.
Source:   C11: guards against copying have destroyed the model that they were to save.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from callbacks.loss_weight_schedule import HasLossWeights, LossWeightSchedule
from callbacks.support.collectives import gathered
from callbacks.support.probing import held_out_batch, record, undisturbed
from callbacks.support.ranges import at_least, check, one_of

log = logging.getLogger(__name__)

NEAR = range(-3, 4)  # the offsets of the seed's sweep
SIDE = 3  # frames on either side of a context


@runtime_checkable
class HasOffsetCosines(Protocol):
    """All that this probe knows of the module."""

    def offset_cosines(self, batch: Any, offsets: Sequence[int]) -> Tensor:
        """(predictions, len(offsets)): the cosine of each prediction of the batch with the frame at each offset, +1 the
        target, 0 the last frame seen; NaN where there is none. Changes nothing."""
        ...


class Drift(FloatingPointError):
    """The predictions resemble other frames more than the next one."""


class FiveCatProbe(Callback):
    """`context`: frames that a prediction has seen. `among`: unseen, the three frames on either side of these; seen,
    −3 … +3 as the seed has it, where whatever follows a slow text peaks at 0. ValueError: a value out of its range.
    """

    def __init__(
        self,
        samples: int = 500,
        context: int = 5,
        from_epoch: int = 3,
        among: str = "unseen",
        act: str = "back_off",
    ) -> None:
        check(
            "five_cat_probe", samples=(samples, at_least(1)), context=(context, at_least(2)),
            from_epoch=(from_epoch, at_least(1)), among=(among, one_of("unseen", "seen")),
            act=(act, one_of("back_off", "observe", "stop")),
        )  # fmt: skip
        self.samples, self.context, self.from_epoch, self.among, self.act = samples, context, from_epoch, among, act
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.drifting = False  # at the last test
        self.back_offs = 0  # tests that have found it, from `from_epoch` on
        self._batch: Any = None

    @property
    def offsets(self) -> list[int]:
        """All that are measured."""
        return sorted({*NEAR, *self.unseen})

    @property
    def unseen(self) -> list[int]:
        """Before the context, and after it."""
        before = range(-self.context - SIDE + 1, -self.context + 1)
        return [*before, *range(1, SIDE + 1)]

    # The judgement

    def sweep(self, cosines: Mapping[int, float], among: str) -> tuple[int, float]:
        """The offset of the largest mean cosine, and by how much that of +1 exceeds the largest other; offsets that no
        row has are left out. NaN where +1 is not finite, or stands alone."""
        wanted = self.unseen if among == "unseen" else NEAR
        found = {k: cosines[k] for k in wanted if k == 1 or math.isfinite(cosines[k])}
        others = [value for k, value in found.items() if k != 1]
        if not math.isfinite(found[1]):
            return 0, math.nan
        return max(found, key=lambda k: found[k]), found[1] - max(others) if others else math.nan

    def judge(self, cosines: Mapping[int, float]) -> str | None:
        """What is wrong, in words; None if nothing is. What is not finite is wrong."""
        peak, margin = self.sweep(cosines, self.among)
        if not math.isfinite(cosines[1]):
            return f"the predictions are not finite: their cosine with the next frame is {cosines[1]}"
        if peak == 1 or margin > 0:
            return None
        return (
            f"drift: the predictions are nearest to the frame at offset {peak:+d}, not to the next one: the margin of "
            f"+1 is {margin:+.4f}"
        )

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError: the module predicts no frames, or has no losses to take away. ValueError: the order."""
        if stage == "fit":
            self.reset()
        if not isinstance(pl_module, HasOffsetCosines):
            raise TypeError(f"five_cat_probe needs offset_cosines(...), which {type(pl_module).__name__} lacks")
        if self.act != "back_off":
            return
        if not isinstance(pl_module, HasLossWeights):
            raise TypeError(
                "five_cat_probe with act=back_off needs loss_weights and set_loss_weight(), which "
                f"{type(pl_module).__name__} lacks"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        later = callbacks[callbacks.index(self) :] if self in callbacks else []
        if any(isinstance(callback, LossWeightSchedule) for callback in later):
            raise ValueError("five_cat_probe must come after loss_weight_schedule, which would set the weights again")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the weights away while it drifts."""
        if self.drifting and self.act == "back_off":
            assert isinstance(pl_module, HasLossWeights)
            for name in pl_module.loss_weights:
                pl_module.set_loss_weight(name, 0.0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The test."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        epoch, cosines = trainer.current_epoch + 1, self.measure(trainer, pl_module)
        wrong = self.judge(cosines)
        acts = wrong is not None and epoch >= self.from_epoch
        values: dict[str, float] = {"cosine": cosines[1], "drift": float(wrong is not None)}
        for among, suffix in ((self.among, ""), ("seen", "_seen")):
            values["peak" + suffix], values["margin" + suffix] = self.sweep(cosines, among)
        record(trainer, {f"five_cat_probe/{name}": value for name, value in values.items()})
        self.drifting, self.back_offs = acts, self.back_offs + acts
        if not acts:
            return
        if self.act == "stop":
            raise Drift(f"epoch {epoch}: {wrong}")
        if trainer.is_global_zero:
            has_any = isinstance(pl_module, HasLossWeights) and any(pl_module.loss_weights.values())
            does = ": the weights of all auxiliary losses go to 0" if self.act == "back_off" and has_any else ""
            log.warning("epoch %d: %s%s", epoch, wrong, does)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, float]:
        """The mean cosine at each offset, over the rows of all ranks; NaN where no row has a frame."""
        assert isinstance(pl_module, HasOffsetCosines)
        if self._batch is None:
            self._batch = held_out_batch(trainer, self.samples, "five_cat_probe", fewer=True)
        with undisturbed(trainer, pl_module):
            cosines = pl_module.offset_cosines(self._batch, self.offsets).double().cpu()
        there = ~cosines.isnan()
        target = self.offsets.index(1)
        finite = bool(cosines[:, target].isfinite().all())  # every prediction has one
        mine = (torch.where(there, cosines, 0.0).sum(0).tolist(), there.sum(0).tolist(), finite)
        everywhere = gathered(trainer, mine)
        found = {}
        for i, k in enumerate(self.offsets):
            count = sum(counts[i] for _, counts, _ in everywhere)
            found[k] = sum(sums[i] for sums, _, _ in everywhere) / count if count else math.nan
        if not all(whole for *_, whole in everywhere):
            found[1] = math.nan
        return found

    def state_dict(self) -> dict[str, Any]:
        """Whether it drifted at the last test, and how often so far."""
        return {"drifting": self.drifting, "back_offs": self.back_offs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.drifting, self.back_offs = state_dict["drifting"], state_dict["back_offs"]
