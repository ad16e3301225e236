"""A module small enough to train in milliseconds, and what goes with it."""

from typing import Any

import lightning
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


class Lines(lightning.pytorch.loggers.logger.DummyLogger):
    """What reached the loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: Any = None, **_: Any) -> None:
        self.rows.append((step, dict(metrics)))


def loader() -> Any:
    data = torch.arange(STEPS * 2, dtype=torch.float32)[:, None].repeat(1, 4)
    return DataLoader(data, batch_size=1)  # type: ignore[arg-type]
