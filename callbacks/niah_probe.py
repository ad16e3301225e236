"""Needle in a haystack: write a known pair into the model's own memory, bury it, and ask for it.

Watches:  the cosine between what the memory retrieves for a needle's key and the needle's value, after `haystack`
          random pairs written in the same way, every `every_n_steps` and before the first step; the same without the
          write, and the same with the gates that the model opens for held-out text.
Acts:     warns below `threshold`, or stops all ranks together (`on_failure: stop`).
Logs:     niah_probe/accuracy (mean over layers, memories, heads and needles), niah_probe/accuracy/layer_<i>,
          niah_probe/control, niah_probe/retained (with the text's gates: how much the model chooses to write and keep;
          not judged),
          niah_probe/overhead_percent (after the first step); to TensorBoard a heat map, layer by depth of the needle
          in the haystack.
Requires: HasWritableMemory and a validation loader.
Source:   C1.
"""

import logging
import math
import time
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as nnf

from callbacks.support.collectives import mean_over_ranks
from callbacks.support.lightning_internals import accumulates, logging_step
from callbacks.support.probing import begins, held_out_batch, layer_numbers, record, undisturbed
from callbacks.support.ranges import at_least, between, check, one_of

log = logging.getLogger(__name__)


@runtime_checkable
class HasWritableMemory(Protocol):
    """All that this probe knows of the module."""

    def memory_shape(self) -> tuple[int, int, int]:
        """Layers with a memory, heads, dimension of keys and values."""
        ...

    def write_and_read(self, keys: Tensor, values: Tensor, query: Tensor, batch: Any = None) -> Tensor:
        """Learn keys and values (layers, heads, N, T, dim) one after another and answer query (layers, heads, N, dim),
        each N from an empty memory: (layers, memories, heads, N, dim). At full strength, or with the gates that the
        text of `batch` opens."""
        ...


class NeedleLost(FloatingPointError):
    """The memory does not give back what was written into it."""


def cosines(found: Tensor, wanted: Tensor) -> Tensor:
    """Cosine along the last axis, the others broadcast; in double precision."""
    return nnf.cosine_similarity(found.double(), wanted.double(), dim=-1)


class NiahProbe(Callback):
    """Probes the memory as it trains; training is left bitwise as it was.

    `depths`: how much of the haystack lies on top of the needle, each in [0, 1]; 1 (all of it) is the accuracy that is
    judged, the others are for the picture. `needles`: independent trials per layer, head and depth. ValueError: a value
    out of its range.
    """

    survives_rollback = True  # it counts seconds, which a rollback does not bring back

    def __init__(
        self,
        every_n_steps: int = 1000,
        threshold: float = 0.8,
        haystack: int = 100,
        needles: int = 4,
        depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
        on_failure: str = "warn",
        seed: int = 0,
    ) -> None:
        check(
            "niah_probe", every_n_steps=(every_n_steps, at_least(1)), haystack=(haystack, at_least(1)),
            needles=(needles, at_least(1)), threshold=(threshold, between(0, 1, "it is a cosine")),
            on_failure=(on_failure, one_of("warn", "stop")),
        )  # fmt: skip
        self.depths = tuple(sorted({float(depth) for depth in depths}))
        if not self.depths or self.depths[0] < 0 or self.depths[-1] != 1:
            raise ValueError(
                f"depths={list(depths)} of niah_probe must lie in [0, 1] and contain 1: all of the haystack"
            )
        self.every_n_steps, self.threshold, self.haystack = every_n_steps, threshold, haystack
        self.needles, self.on_failure, self.seed = needles, on_failure, seed
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.probes, self.seconds = 0, 0.0  # how often, and how long
        self._trained = 0.0  # seconds of training before this process began to train
        self._began: float | None = None
        self._batch: Any = None

    # The judgement

    def judge(self, accuracy: float, control: float, step: int) -> str | None:
        """What is wrong, in words; None if nothing is. What is not finite is wrong: comparisons with it are False."""
        remedy = "its features are too few (model.rank), or W_init was learned too fast (optim.memory_lr)"
        if not (math.isfinite(accuracy) and math.isfinite(control)):
            return f"needle probe at step {step}: accuracy {accuracy}, control {control}: the answers are not finite"
        if accuracy < self.threshold:
            return f"needle probe at step {step}: accuracy {accuracy:.3f} is below {self.threshold}: {remedy}"
        if abs(control) > 0.3:
            return (
                f"needle probe at step {step}: {control:.3f} without the needle, where 0 is right: the probe sees "
                "something else than the memory's writes"
            )
        return None

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError if the module's memory cannot be written from outside; ValueError if it has none."""
        if stage == "fit":
            self.reset()
        if not isinstance(pl_module, HasWritableMemory):
            raise TypeError(
                f"niah_probe needs memory_shape() and write_and_read(...), which {type(pl_module).__name__} lacks"
            )
        if pl_module.memory_shape()[0] < 1:
            raise ValueError(
                "niah_probe: this model has no memory that takes pairs: remove the probe with ~callbacks.niah_probe"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe what training starts from; a resumed run was probed when it was saved, or waits for its next probe."""
        self._began = time.perf_counter()
        self._batch = held_out_batch(trainer, 1, "niah_probe")
        if begins(trainer):
            self.probes = 0  # also of a run that is resumed from before its first step
            self.probe(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe if it is time."""
        if not accumulates(trainer) and trainer.global_step % self.every_n_steps == 0:
            self.probe(trainer, pl_module)

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log, judge."""
        start = time.perf_counter()
        accuracy_LD, control, retained = self.measure(trainer, pl_module)
        buried = accuracy_LD[:, -1]
        mean, numbers = float(buried.mean()), layer_numbers(pl_module, len(buried))
        values = {"niah_probe/accuracy": mean, "niah_probe/control": control, "niah_probe/retained": retained}
        values |= {f"niah_probe/accuracy/layer_{i}": float(value) for i, value in zip(numbers, buried, strict=True)}
        self._draw(trainer, accuracy_LD, numbers)
        self.probes, self.seconds = self.probes + 1, self.seconds + time.perf_counter() - start
        if trainer.global_step:  # before that there is no training to compare with
            values["niah_probe/overhead_percent"] = self.overhead_percent()
        values["niah_probe/step"] = trainer.global_step
        record(trainer, values)
        wrong = self.judge(mean, control, trainer.global_step)
        if wrong and self.on_failure == "stop":
            raise NeedleLost(wrong)
        if wrong and trainer.is_global_zero:
            log.warning(wrong)

    def overhead_percent(self) -> float:
        """Share of the training time so far that probes took, in percent."""
        elapsed = self._trained + (time.perf_counter() - self._began if self._began is not None else 0.0)
        return 100 * self.seconds / elapsed if elapsed > self.seconds else 100.0

    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, float, float]:
        """Mean cosines over all ranks: of the needle (layers, depths), without its write, and with the text's gates."""
        assert isinstance(pl_module, HasWritableMemory)
        layers, heads, dim = pl_module.memory_shape()
        keys, values = self.pairs(layers, heads, dim)
        device = trainer.strategy.root_device
        keys, values = keys.to(device), values.to(device)
        needle_k, needle_v = keys[..., :1, :], values[..., :1, :]
        straw_k, straw_v = keys[..., 1:, :], values[..., 1:, :]
        rows_k: list[Tensor] = []
        rows_v: list[Tensor] = []
        for depth in self.depths:
            above = round(depth * self.haystack)  # straws written after the needle
            for rows, needle, straw in ((rows_k, needle_k, straw_k), (rows_v, needle_v, straw_v)):
                rows.append(torch.cat([straw[..., above:, :], needle, straw[..., :above, :]], dim=-2))
        query, wanted = needle_k.squeeze(-2), needle_v.squeeze(-2)
        with undisturbed(trainer, pl_module):
            found = pl_module.write_and_read(
                torch.cat(rows_k, dim=2), torch.cat(rows_v, dim=2), query.repeat(1, 1, len(self.depths), 1)
            )
            empty = pl_module.write_and_read(straw_k, straw_v, query)
            kept = pl_module.write_and_read(rows_k[-1], rows_v[-1], query, self._batch)
        found = found.unflatten(3, (len(self.depths), self.needles)).movedim(3, 1)  # (layers, depths, memories, …)
        accuracy = cosines(found, wanted[:, None, None]).mean(dim=(2, 3, 4))
        single = torch.stack([cosines(y, wanted[:, None]).mean() for y in (empty, kept)])
        both = mean_over_ranks(trainer, torch.cat([accuracy.flatten(), single]).float()).cpu()
        return both[:-2].unflatten(0, (layers, len(self.depths))), float(both[-2]), float(both[-1])

    def pairs(self, layers: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
        """Random unit keys and values (layers, heads, needles, 1 + haystack, dim), needle first; always the same."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, layers, heads, self.needles, 1 + self.haystack, dim)
        keys, values = nnf.normalize(torch.randn(shape, generator=generator), dim=-1)
        return keys, values

    def _draw(self, trainer: Trainer, accuracy_LD: Tensor, numbers: list[int]) -> None:
        """A heat map: from which layers and depths the needle comes back."""
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or not trainer.is_global_zero or not bool(accuracy_LD.isfinite().all()):
            return
        from matplotlib.figure import Figure  # half a second, for those who have a board

        figure = Figure(figsize=(5, 1.6 + 0.35 * len(accuracy_LD)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(accuracy_LD.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(self.depths)), [f"{round(depth * self.haystack)}" for depth in self.depths])
        axes.set_yticks(range(len(accuracy_LD)), [f"layer {i}" for i in numbers])
        axes.set_xlabel("pairs written after the needle")
        for i, row in enumerate(accuracy_LD.tolist()):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5 else "white")
        figure.colorbar(image, label="cosine")
        step = logging_step(trainer)
        for board in boards:
            board.experiment.add_figure("niah_probe/layer_by_depth", figure, step, close=False)

    def state_dict(self) -> dict[str, Any]:
        """How much was probed and how long everything took, for the overhead."""
        elapsed = self._trained + (time.perf_counter() - self._began if self._began is not None else 0.0)
        return {"probes": self.probes, "seconds": self.seconds, "trained": elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.probes, self.seconds, self._trained = (state_dict[name] for name in ("probes", "seconds", "trained"))
