"""The held-out batch that probes measure on: as many rows as are asked for, from as many batches as it takes."""

import logging
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.spike_rollback import SpikeRollback
from callbacks.support.probing import held_out_batch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def trainer_of(batches: list[Any]) -> Any:
    strategy = SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: batch)
    return SimpleNamespace(val_dataloaders=batches, strategy=strategy, is_global_zero=True)


def rows(*counts: int, width: int = 3) -> list[Tensor]:
    whole = torch.arange(sum(counts) * width).view(-1, width)
    return list(whole.split(list(counts)))


@pytest.mark.parametrize(
    ("counts", "asked", "given"),
    [((4, 4), 1, 1), ((4, 4), 4, 4), ((4, 4), 6, 6), ((1, 1, 1), 3, 3), ((2, 3, 4), 8, 8), ((4, 4), None, 4)],
)
def test_as_many_rows_as_asked(
    counts: tuple[int, ...], asked: int | None, given: int, caplog: pytest.LogCaptureFixture
) -> None:
    batches = rows(*counts)
    found = held_out_batch(trainer_of([batches]), asked, "probe")
    assert torch.equal(found, torch.cat(batches)[:given])
    assert not caplog.records


def test_batches_are_joined_leaf_by_leaf() -> None:
    batches = [{"x": x, "y": [x + 1]} for x in rows(2, 2)]
    found = held_out_batch(trainer_of([batches]), 3, "probe")
    assert torch.equal(found["x"], torch.cat(rows(2, 2))[:3])
    assert torch.equal(found["y"][0], found["x"] + 1)


@pytest.mark.parametrize(
    "batches",
    [
        rows(2, 3),
        [torch.zeros(5, 2), torch.zeros(5, 3)],
        [(torch.zeros(5, 2), "name"), (torch.zeros(5, 2), "name")],
        [torch.zeros(5), (torch.zeros(5),)],
    ],
    ids=["too few", "other lengths", "no tensors", "another form"],
)
def test_fewer_than_asked_for_are_reported(batches: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = held_out_batch(trainer_of([batches]), 64, "probe")
    first = found[0] if isinstance(found, tuple) else found
    assert len(first) == 5
    [record] = caplog.records
    assert record.args == ("probe", 64, 5)


def test_what_has_no_rows_is_left_alone() -> None:
    assert held_out_batch(trainer_of([["a", "b"]]), 64, "probe") == "a"


class Noisy(lightning.LightningModule):
    """A classifier whose labels are right three times in four: healthy, and never certain of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)

    def held_out_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.held_out_loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.held_out_loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def samples(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 4, generator=generator)
    y = (x.sum(1) > 0) ^ (torch.rand(1024, generator=generator) > 0.75)
    return DataLoader(TensorDataset(x, y.long()), batch_size=16)


def spikes(folder: Any, *more: Callback, **settings: Any) -> list[int]:
    guard = SpikeRollback(str(folder), every_n_steps=5, mode="observe", **settings)
    trainer = lightning.Trainer(
        max_steps=120, callbacks=[*more, guard], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Noisy(), samples(0), samples(1))
    return guard.spikes


class Spoiled(Callback):
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 100:
            with torch.no_grad():
                pl_module.layer.weight.neg_()


def test_a_healthy_noisy_classifier_is_no_spike(tmp_path: Any) -> None:
    assert spikes(tmp_path) == []  # as it comes: the whole first batch
    assert spikes(tmp_path, rows=256) == []
    assert spikes(tmp_path, rows=1) != []  # a single sample says nothing
    assert spikes(tmp_path, Spoiled(), rows=256)[0] == 100
