"""A safeguard in a LightningModule that knows nothing of atlas-lm: python docs/examples/own_module.py

The weights are spoiled on purpose after step 32. The rollback sees it at step 35 and returns to an earlier snapshot.
"""

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# isort: split
# README: from here
import lightning as L

from callbacks import SpikeRollback


def fit(module, training, validation, folder, callbacks=(), **settings):
    module.held_out_loss = module.loss  # all that it asks of a module: the mean loss of a batch
    rollback = SpikeRollback(folder, threshold=0.05, every_n_steps=5, max_rollbacks=3, rows=64)  # 64 held-out samples
    trainer = L.Trainer(max_steps=60, callbacks=[*callbacks, rollback], **settings)
    trainer.fit(module, training, validation)
    return rollback


# README: to here


class Regression(L.LightningModule):
    """Stands for a module of your own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 1)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layer(x), y)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def batches(seed: int) -> DataLoader[Any]:
    """A linear function with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 8, generator=generator)
    y = x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(512, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Spoil(L.Callback):
    """What a fault does: every weight is halved, once, after step 32."""

    def __init__(self) -> None:
        self.done = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 32 and not self.done:
            self.done = True
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(0.5)


def main(say: Callable[[str], object] = print) -> tuple[SpikeRollback, float]:
    """Train with the fault and the safeguard; the safeguard, and the held-out loss at the end."""
    module = Regression()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        rollback = fit(module, batches(seed=0), batches(seed=1), folder, [Spoil()], **quiet)
    with torch.no_grad():
        loss = float(torch.stack([module.loss(batch) for batch in batches(seed=1)]).mean())
    say(f"spikes at steps {rollback.spikes}, {rollback.rollbacks} rollback(s), held-out loss {loss:.3f}")
    return rollback, loss


if __name__ == "__main__":
    sys.exit(0 if main()[0].rollbacks == 1 else 1)
