"""Ctrl-C ends at a step's border with a checkpoint; twice, at once."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from callbacks.interrupt import Interrupt


class PressCtrlC(lightning.Callback):
    """In the middle of a step, `times` times."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            presses, self.times = self.times, 0
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def ctrl_c_is_given_back() -> Any:
    """Whichever way a run ends."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def test_the_step_is_finished_and_saved(fit: Any, line: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "c" / "interrupted.ckpt", line()
    with pytest.raises(SystemExit) as ending:
        fit(module, PressCtrlC(step=3), Interrupt(str(path)))
    assert ending.value.code == 1
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 4, "the step in which it was pressed is complete"
    assert torch.equal(saved["state_dict"]["layer.weight"], module.layer.weight)


def test_twice_is_at_once(fit: Any, line: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "interrupted.ckpt", line()
    with pytest.raises(SystemExit):
        fit(module, PressCtrlC(step=3, times=2), Interrupt(str(path)))
    assert not path.exists()
    assert len(module.seen) == 4


def test_it_waits_for_the_end_of_an_accumulation_window(fit: Any, line: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "interrupted.ckpt", line()
    with pytest.raises(SystemExit):
        fit(module, PressCtrlC(step=1), Interrupt(str(path)), accumulate_grad_batches=2)
    assert len(module.seen) == 4
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_without_ctrl_c_nothing_happens_and_training_is_bitwise_the_same(fit: Any, line: Any, tmp_path: Path) -> None:
    with_it, without = line(), line()
    fit(with_it, Interrupt(str(tmp_path / "interrupted.ckpt")))
    fit(without)
    assert not (tmp_path / "interrupted.ckpt").exists()
    for ours, theirs in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ranks_stop_together(tmp_path: Path) -> None:
    class Strategy:
        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            assert not all, "one rank's Ctrl-C is enough"
            return True  # the other rank was interrupted

    class Loop:
        def _should_accumulate(self) -> bool:
            return False

    class TwoRanks:
        world_size, strategy, fit_loop = 2, Strategy(), Loop()
        saved: str | None = None

        def save_checkpoint(self, path: str, weights_only: bool) -> None:
            assert not weights_only
            self.saved = path

    trainer = TwoRanks()
    with pytest.raises(KeyboardInterrupt):
        Interrupt("here.ckpt").on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert trainer.saved == "here.ckpt"
