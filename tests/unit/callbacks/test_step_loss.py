"""One collector of a step's loss: what training_step returned, whatever accumulation and a loss scaler make of it."""

from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from callbacks.support.step_loss import begin_step_losses, mean_step_loss, note_loss, step_losses
from tests.support.toys import Line


class Returns(Line):
    """Remembers what training_step returned; skips the micro-batches in `skips`."""

    def __init__(self, skips: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.skips, self.returned = skips, []

    def training_step(self, batch: Tensor, index: int) -> Any:
        loss = super().training_step(batch, index)
        if index in self.skips:
            return None
        self.returned.append(float(loss.detach()))
        return loss


class Reads(lightning.Callback):
    """Collects at each step's optimizer step, and at its end."""

    def __init__(self) -> None:
        self.before: list[list[float]] = []
        self.after: list[list[float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        begin_step_losses(trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        note_loss(trainer, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before.append([float(loss) for loss in step_losses(trainer)])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.after.append([float(loss) for loss in step_losses(trainer)])
            assert not self.after[-1] or float(mean_step_loss(trainer)) > 0


def close(a: list[list[float]], b: list[list[float]]) -> None:
    assert [len(x) for x in a] == [len(x) for x in b]
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_two_readers_see_each_micro_batch_once(fit: Any) -> None:
    module, first, second = Returns(), Reads(), Reads()
    second_key = type("Second", (Reads,), {})()
    fit(module, first, second_key, accumulate_grad_batches=2, max_steps=4)
    del second
    wanted = [module.returned[i : i + 2] for i in range(0, 8, 2)]
    for reader in (first, second_key):
        close(reader.before, wanted)
        close(reader.after, wanted)


def test_a_loss_scaler_is_taken_back(fit: Any) -> None:
    module, reads = Returns(), Reads()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(module, reads, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_steps=4)
    torch.testing.assert_close([x for [x] in reads.before], module.returned, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_whose_micro_batches_were_all_skipped_has_no_loss(fit: Any) -> None:
    """And does not show those of the step before."""
    module, reads = Returns(skips=(2, 3)), Reads()
    fit(module, reads, accumulate_grad_batches=2, max_steps=4)
    assert [len(losses) for losses in reads.after] == [2, 0, 2, 2]
