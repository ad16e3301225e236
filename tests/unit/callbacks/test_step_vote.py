"""One wait for the device, and one message between ranks, in a step with all safeguards."""

import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist

from callbacks.interrupt import Interrupt
from callbacks.nonfinite_guard import NonfiniteGuard
from callbacks.outlier_guard import OutlierGuard
from callbacks.proactive_clipping import ProactiveClipping
from callbacks.spike_rollback import SpikeRollback
from callbacks.step_checkpoint import StepCheckpoint
from callbacks.support import collectives, step_vote
from callbacks.support.step_vote import enter, largest, vote
from callbacks.weight_integrity import WeightIntegrity
from tests.support.toys import STEPS, Line, loader
from tests.support.two_ranks import run_on_two_ranks, shared_folder


class FakeTrainer:
    """One rank; the micro-batch is set by hand."""

    def __init__(self) -> None:
        self.world_size, self.strategy = 1, SimpleNamespace(root_device=torch.device("cpu"))
        progress = SimpleNamespace(total=SimpleNamespace(ready=1))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))

    def next_batch(self) -> None:
        self.fit_loop.epoch_loop.batch_progress.total.ready += 1


def test_ballots_are_taken_once_a_step() -> None:
    trainer: Any = FakeTrainer()
    module: Any = None
    taken = []

    def ballot(*_: Any) -> float:
        taken.append(1)
        return 3.0

    enter(trainer, one=ballot, other=lambda *_: torch.tensor(5))
    assert [vote(trainer, module, name) for name in ("one", "other", "one")] == [3.0, 5.0, 3.0]
    assert len(taken) == 1
    trainer.next_batch()
    assert vote(trainer, module, "one") == 3.0
    assert len(taken) == 2
    with pytest.raises(KeyError):
        vote(trainer, module, "nobody's")


def test_a_new_fit_votes_again() -> None:
    trainer: Any = FakeTrainer()
    module: Any = None
    enter(trainer, one=lambda *_: 1.0)
    assert vote(trainer, module, "one") == 1.0
    enter(trainer, one=lambda *_: 2.0)
    assert vote(trainer, module, "one") == 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinite(value: float) -> None:
    trainer: Any = FakeTrainer()
    assert largest(trainer, {"told": value, "held": torch.tensor(value), "fine": 1.0}) == {
        "held": math.inf, "told": math.inf, "fine": 1.0,
    }  # fmt: skip


def test_nothing_is_read_of_numbers_that_the_host_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = FakeTrainer()
    monkeypatch.setattr(step_vote.torch, "tensor", lambda *_, **__: pytest.fail("sent to the device for nothing"))
    assert largest(trainer, {"a": 1.0, "b": 0.0}) == {"a": 1.0, "b": 0.0}


class Chunks(Line):
    """A module that proactive clipping knows."""

    local_chunks = (32,)


def safeguards(folder: Path) -> list[Any]:
    """All that look at every step."""
    return [
        WeightIntegrity(), NonfiniteGuard(1), OutlierGuard(), ProactiveClipping(),
        SpikeRollback(str(folder), every_n_steps=1000, watch="training_loss"),
        StepCheckpoint(str(folder), 1000, every_n_minutes=60), Interrupt(str(folder / "interrupt.ckpt")),
    ]  # fmt: skip


READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "cpu")


class Reads(lightning.Callback):
    """Counts what safeguards read of tensors in each step, and what they send to other ranks.

    On a CPU a tensor of the host cannot be told from one of the device: what is counted is an upper bound.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now: list[str] = []
        self.steps: list[list[str]] = []
        for name in READS:
            patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        for name in ("equal",):
            patch.setattr(torch, name, self._counted(name, getattr(torch, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            file = frame.f_code.co_filename
            if "/callbacks/" in file and "/tests/" not in file:
                self.now.append(f"{name} in {Path(file).stem}.{frame.f_code.co_name}")
            return function(*args, **kwargs)

        return counted

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(self.now)
        self.now = []


def reads(folder: Path) -> list[list[str]]:
    """In each step but the first two, in which views are made."""
    with pytest.MonkeyPatch.context() as patch:
        counter = Reads(patch)
        trainer = lightning.Trainer(
            callbacks=[*safeguards(folder), counter], accelerator="cpu", devices=1, max_steps=STEPS, logger=False,
            enable_model_summary=False, enable_progress_bar=False, default_root_dir=folder, num_sanity_val_steps=0,
            limit_val_batches=0, log_every_n_steps=1000,
        )  # fmt: skip
        trainer.fit(Chunks(), loader(), loader())
    return counter.steps[3:]


def test_all_safeguards_together_wait_once_a_step(tmp_path: Path) -> None:
    found = reads(tmp_path)
    assert len(found) == STEPS - 3
    assert found == [["tolist in step_vote.largest"]] * len(found)


def test_a_second_read_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NonfiniteGuard.on_before_optimizer_step

    def reads_too(self: Any, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        bool(step_vote.norm_of_gradients(trainer, pl_module) > 0)
        original(self, trainer, pl_module, optimizer)

    reads_too.__code__ = reads_too.__code__.replace(co_filename="/x/callbacks/nonfinite_guard.py")
    monkeypatch.setattr(NonfiniteGuard, "on_before_optimizer_step", reads_too)
    assert all(len(step) == 2 for step in reads(tmp_path))


def one_message_a_step() -> list[tuple[int, int, int]]:
    """Of each step: collectives of safeguards, all-reduces and barriers that Python calls."""
    steps: list[tuple[int, int, int]] = []
    counts = {"all_reduce": 0, "barrier": 0}

    class Counter(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.append((collectives.entered[0], counts["all_reduce"], counts["barrier"]))

    with pytest.MonkeyPatch.context() as patch:

        def counted(name: str, function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                counts[name] += 1
                return function(*args, **kwargs)

            return call

        for name in counts:
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        trainer = lightning.Trainer(
            callbacks=[*safeguards(shared_folder()), Counter()], accelerator="cpu", devices=2, strategy="ddp",
            max_steps=STEPS, logger=False, enable_model_summary=False, enable_progress_bar=False,
            default_root_dir=shared_folder(), num_sanity_val_steps=0, limit_val_batches=0, log_every_n_steps=1000,
        )  # fmt: skip
        trainer.fit(Chunks(), loader(), loader())
    return [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(steps)]  # type: ignore[misc]


def test_all_safeguards_together_send_one_message_a_step() -> None:
    for steps in run_on_two_ranks(one_message_a_step)[0]:
        assert len(steps) >= 2
        assert steps == [(1, 1, 0)] * len(steps)
