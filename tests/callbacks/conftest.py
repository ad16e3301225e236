"""A module small enough to train in milliseconds, for callbacks that work with any LightningModule."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS = 8


class Line(lightning.LightningModule):
    """Fits one number per step; `bad` maps optimizer steps to losses that take the place of the true one."""

    def __init__(self, bad: dict[int, float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.bad = bad or {}
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.append(int(batch[0, 0]))
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        if self.global_step in self.bad:
            return loss * self.bad[self.global_step]
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def loader() -> Any:
    data = torch.arange(STEPS * 2, dtype=torch.float32)[:, None].repeat(1, 4)
    return DataLoader(data, batch_size=1)  # type: ignore[arg-type]


@pytest.fixture
def fit(tmp_path: Path) -> Any:
    """fit(module, *callbacks, **trainer arguments) trains for STEPS steps and returns the Trainer."""

    def run(module: Line, *callbacks: Any, ckpt_path: Any = None, **changes: Any) -> lightning.Trainer:
        settings: dict[str, Any] = {
            "max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks),
            "enable_progress_bar": any(isinstance(c, lightning.pytorch.callbacks.ProgressBar) for c in callbacks),
            "default_root_dir": tmp_path, "num_sanity_val_steps": 0,
            "limit_val_batches": 0, "log_every_n_steps": 1,
        }  # fmt: skip
        trainer = lightning.Trainer(callbacks=list(callbacks), **{**settings, **changes})
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def line() -> type[Line]:
    return Line
