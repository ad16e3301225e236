"""G2-6: spoil the weights of a short training on purpose, and see whether the run's rollback mends them."""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from atlas_lm.checkpoints.io import AtomicCheckpointIO
from atlas_lm.exit_gates.artifacts import RunArtifacts
from atlas_lm.exit_gates.result import GateResult

STEPS, EVERY, SPOILED_AT = (
    8,
    2,
    5,
)  # steps of the training, between evaluations, and after which the weights are spoiled
FACTOR = 10.0  # on every weight
LR = 1e-6  # moves weights by more than a rounding, and the loss by nothing


def digest(module: LightningModule) -> str:
    """Of every bit of every parameter and buffer."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class ForcedSpike(Callback):
    """Multiplies all weights by FACTOR, once, after step SPOILED_AT, and watches what becomes of them.

    Runs before the rollback, which is a `Checkpoint`; so a return shows at the beginning of the next step.
    """

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}  # by optimizer steps done, before the weights are spoiled
        self.returns: list[tuple[int, bool]] = []  # step that was returned to, whether the weights were those of then
        self.losses: list[float] = []  # since the last return
        self._step = 0
        self._spoiled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights that training starts from."""
        self.digests[trainer.global_step] = digest(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Has training gone back?"""
        step = trainer.global_step
        if step < self._step:
            self.returns.append((step, self.digests.get(step) == digest(pl_module)))
            self.losses = []
        self._step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Spoil the weights if it is time."""
        self._step = trainer.global_step
        self.losses.append(float(outputs["loss"]))
        if self._spoiled:
            return
        self.digests[self._step] = digest(pl_module)
        if self._step == SPOILED_AT:
            self._spoiled = True
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.mul_(FACTOR)


def judge(spike: ForcedSpike, rollbacks: int, reached: int) -> GateResult:
    """The training after `spike` counted `rollbacks` and ended at step `reached`."""
    wrong = []
    before = [spike.digests.get(step) for step in range(SPOILED_AT + 1)]
    if None in before or any(a == b for a, b in pairwise(before)):
        wrong.append("training did not change the weights: the check could not fail")
    if rollbacks != 1 or len(spike.returns) != 1:
        wrong.append(f"{rollbacks} rollbacks counted, {len(spike.returns)} seen, where 1 is right")
    for step, same in spike.returns:
        if not same:
            wrong.append(f"the weights after the return to step {step} are not those of step {step}")
    if reached != STEPS:
        wrong.append(f"training ended at step {reached} of {STEPS}")
    if not spike.losses or not all(map(math.isfinite, spike.losses)):
        wrong.append(f"the losses at the end are {spike.losses}")
    to = ", ".join(str(step) for step, _ in spike.returns)
    fine = f"forced at step {SPOILED_AT}, back to step {to} bit for bit, on to step {reached}"
    return GateResult(not wrong, rollbacks, "; ".join(wrong) or fine)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning and the callbacks log of a training that nobody asked for."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric", "callbacks")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def forced(run: RunArtifacts) -> GateResult:
    """G2-6: a few steps from the checkpoint's weights on the run's data, on the CPU."""
    rows = int(run.group("callbacks.spike_rollback").get("rows", 2))
    module = run.new_module(lr=LR, muon_lr=LR, memory_lr=LR, warmup_steps=0, total_steps=STEPS)
    spike = ForcedSpike()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        rollback = run.build("callbacks.spike_rollback", folder=folder, every_n_steps=EVERY)
        trainer = Trainer(
            accelerator="cpu", devices=1, precision="32-true", max_steps=STEPS, max_epochs=-1, logger=False,
            callbacks=[spike, rollback], gradient_clip_val=float(run.group("optim")["clip"]), val_check_interval=10**6,
            check_val_every_n_epoch=None, limit_val_batches=1, num_sanity_val_steps=0, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
            plugins=[AtomicCheckpointIO()],
        )  # fmt: skip
        trainer.fit(module, run.data(batch_size=1, val_batch_size=rows, val_sequences=rows))
    return judge(spike, int(rollback.rollbacks), trainer.global_step)
