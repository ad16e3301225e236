"""The oracle of the rollback on next-vector prediction: rolled back, and never having seen the dropped batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from atlas_lm.latent.module import LatentModule
from callbacks.spike_rollback import SpikeRollback
from tests.support.rollback_cases import EVALUATE_EVERY, differences, plain
from tests.unit.latent.test_module import CONTEXT, DIM, MODEL, OPTIM, batch

STEPS = 10


class Numbered(IterableDataset[Any]):
    """Batches by their numbers, which travel with them."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({**batch(seed=n), "number": torch.tensor(n)} for n in self.order)


class Faulty(LatentModule):
    """Spoils its weights while the batch of a number trains."""

    bad: int | None = None

    def training_step(self, given: dict[str, Tensor], batch_idx: int) -> Any:
        number = int(given.pop("number"))
        if number == self.bad:
            with torch.no_grad():
                for weight in self.parameters():
                    weight.mul_(-3.0)
        return super().training_step(given, batch_idx)

    def validation_step(self, given: dict[str, Tensor], batch_idx: int) -> Any:
        given.pop("number", None)
        return super().validation_step(given, batch_idx)


def trained(order: list[int], folder: Path, memory: str, bad: int | None = None) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(0)
    module = Faulty({**MODEL, "memory": memory}, OPTIM, DIM, "unknown", CONTEXT, 11, head="residual", guard_cap=0.1)
    module.bad = bad
    module.set_loss_weight("direction", 0.002)
    guard = SpikeRollback(str(folder), every_n_steps=EVALUATE_EVERY, rows=2)
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, gradient_clip_val=1.0, limit_val_batches=1, num_sanity_val_steps=0,
        val_check_interval=1000, check_val_every_n_epoch=None, default_root_dir=folder, callbacks=[guard],
    )  # fmt: skip
    trainer.fit(module, *(DataLoader(Numbered(numbers), batch_size=None) for numbers in (order, [999])))
    state = {
        "weights": plain(module.state_dict()), "optimizer": plain(trainer.optimizers[0].state_dict()),
        "scheduler": plain(trainer.lr_scheduler_configs[0].scheduler.state_dict()), "step": trainer.global_step,
        "loss_weights": dict(module.loss_weights),
    }  # fmt: skip
    return state, guard


@pytest.mark.parametrize("memory", ["none", "atlas"])
def test_a_run_that_was_rolled_back_is_one_that_never_saw_the_batches(memory: str, tmp_path: Path) -> None:
    ours, guard = trained([*range(STEPS + 4)], tmp_path / "a", memory, bad=6)
    assert guard.rollbacks == 1
    assert guard.spikes == [8]  # the second most recent snapshot is that of step 4: batches 4 to 7 are dropped
    theirs, quiet = trained([*range(4), *range(8, STEPS + 4)], tmp_path / "b", memory)
    assert quiet.rollbacks == 0
    assert ours["step"] == STEPS
    assert differences(ours, theirs) == []


def test_the_oracle_can_fail(tmp_path: Path) -> None:
    ours, _ = trained([*range(STEPS + 4)], tmp_path / "a", "none")
    theirs, _ = trained([*range(4), *range(8, STEPS + 4)], tmp_path / "b", "none")
    assert differences(ours, theirs)
