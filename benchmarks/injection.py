"""Faults, as callbacks that do to a run what a cluster does: python -m benchmarks.faults puts them into train.py's.

Each strikes once, at training batch `at` of the whole run: batches are counted on over rollbacks and resumes, and a
file in the run's folder remembers that it has struck. Which weight, bit or moment is hit is drawn from `seed`.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

STRUCK = "struck.json"  # in the run folder: batch, step and time of the fault


class Fault(Callback):
    """`lasts`: batches. Strikes on the last rank alone where `everywhere` is False."""

    everywhere = True
    lasts = 1

    def __init__(self, folder: str, at: int, seed: int = 0) -> None:
        self.path, self.at = Path(folder) / STRUCK, at
        self.generator = torch.Generator().manual_seed(seed)
        self.until = 0

    def strikes(self, trainer: Trainer) -> bool:
        """Whether this batch is hit; the first time it is written down."""
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        mine = self.path.with_suffix(f".{trainer.global_rank}")  # each rank remembers by itself: one may be ahead
        if batch == self.at and not mine.exists():
            self.until = self.at + self.lasts
            mine.touch()
            if trainer.is_global_zero:
                note = {"batch": batch, "step": trainer.global_step, "time": time.time()}
                self.path.write_text(json.dumps(note))
        here = self.everywhere or trainer.global_rank == trainer.world_size - 1
        return here and self.at <= batch < self.until

    def draw(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.strikes(trainer):
            with torch.no_grad():
                self.hit(trainer, pl_module, batch)

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """The fault, before the batch is trained on."""


class Nothing(Fault):
    """A clean run."""


class NaNGradient(Fault):
    """NaN in one rank's gradient."""

    everywhere = False

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        chosen = parameters[self.draw(len(parameters))]

        def spoil(gradient: Tensor) -> Tensor:
            handle.remove()
            return gradient * math.nan

        handle = chosen.register_hook(spoil)


class InfiniteLoss(Fault):
    """The loss of one batch is infinite."""

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        step = pl_module.training_step

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            pl_module.training_step = step  # type: ignore[method-assign]
            return step(*args, **kwargs) * math.inf

        pl_module.training_step = spoiled  # type: ignore[method-assign]


class LearningRate(Fault):
    """A hundred times the learning rate for 20 steps."""

    lasts = 20

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.at <= trainer.fit_loop.epoch_loop.batch_progress.total.ready < self.until:
            for group in optimizer.param_groups:
                group["lr"] *= 100


class GarbageTokens(Fault):
    """20 batches of random tokens, or of random directions in place of the frames."""

    lasts = 20

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if "frames" in batch:
            noise = torch.randn(batch["frames"].shape, generator=self.generator)
            batch["frames"].copy_(torch.nn.functional.normalize(noise, dim=-1))
            return
        for name in ("input_ids", "targets"):
            values = batch[name]
            values.copy_(torch.randint(int(values.max()) + 1, values.shape, generator=self.generator))


class BitFlip(Fault):
    """One exponent bit of one weight."""

    everywhere = False

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        sizes = torch.tensor([p.numel() for p in parameters]).cumsum(0)
        index = self.draw(int(sizes[-1]))
        which = int(torch.searchsorted(sizes, index, right=True))
        flat = parameters[which].data.view(-1).view(torch.int32)
        flat[index - int(sizes[which])] ^= 1 << (23 + self.draw(8))


class EmptyMemory(Fault):
    """Every W_init is zero."""

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        for name, p in pl_module.named_parameters():
            if ".initial." in name:
                p.zero_()


class ShutGates(Fault):
    """The fusion gates are pushed to −20: attention alone passes."""

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        for name, p in pl_module.named_parameters():
            if name.endswith("fusion.gate.bias"):
                p.fill_(-20.0)


class Moments(Fault):
    """The optimizer's moments, minus a thousand times."""

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.numel() > 1 and "sq" not in name:
                        value.mul_(-1000.0)


class OneRankDrifts(Fault):
    """One rank's weights are perturbed by a thousandth."""

    everywhere = False

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        for p in pl_module.parameters():
            p.mul_(1 + 1e-3 * torch.randn(p.shape, generator=self.generator))


class WorkerKilled(Fault):
    """A process that loads data dies."""

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        import multiprocessing

        workers = [child for child in multiprocessing.active_children() if child.pid]
        os.kill(workers[self.draw(len(workers))].pid or 0, 9)


class RankStops(Fault):
    """The last rank stops answering, as a machine that hangs does."""

    everywhere = False

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        os.kill(os.getpid(), 19)  # SIGSTOP


class Terminated(Fault):
    """SIGTERM, as a scheduler that preempts."""

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        os.kill(os.getpid(), 15)


class Killed(Fault):
    """SIGKILL, as the kernel when memory is short."""

    def hit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        os.kill(os.getpid(), 9)


class Soak(Callback):
    """A fault every `every_s` seconds, one kind after another, and samples of what the process holds.

    Both go to files in `folder`: faults.jsonl and samples.jsonl.
    """

    KINDS = (NaNGradient, BitFlip, GarbageTokens, InfiniteLoss, Moments, EmptyMemory, LearningRate, ShutGates)

    def __init__(self, folder: str, every_s: float = 240, sample_s: float = 10, seed: int = 0) -> None:
        self.folder, self.every_s, self.sample_s, self.seed = Path(folder), every_s, sample_s, seed
        self.faults = 0
        self.current: Fault | None = None
        self.began = self.sampled = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now, number = time.monotonic(), trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if now - self.sampled >= self.sample_s:
            self.sampled = now
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._note("samples", {
                "seconds": now - self.began, "step": trainer.global_step, "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
            })  # fmt: skip
        if now - self.began >= self.every_s * (self.faults + 1):
            kind = self.KINDS[self.faults % len(self.KINDS)]
            self.faults += 1
            for mark in self.folder.glob(f"{Path(STRUCK).stem}.*"):
                mark.unlink()
            self.current = kind(str(self.folder), at=number, seed=self.seed + self.faults)
            self._note("faults", {"seconds": now - self.began, "kind": kind.__name__, "batch": number})
        if self.current is not None:
            self.current.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.current is not None:
            self.current.on_before_optimizer_step(trainer, pl_module, optimizer)

    def _note(self, name: str, values: dict[str, Any]) -> None:
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
