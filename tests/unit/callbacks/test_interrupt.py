"""Ctrl-C and a scheduler's signals end at a step end with a checkpoint; Ctrl-C twice, at once."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from callbacks.interrupt import Interrupt, Preempted
from tests.support.toys import STEPS, Line, loader
from tests.support.two_ranks import run_on_two_ranks, shared_folder


class Send(lightning.Callback):
    """A signal to this process in the middle of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_saves_and_asks_to_be_run_again(
    fit: Any, line: Any, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    path, module = tmp_path / "interrupted.ckpt", line()
    with pytest.raises(Preempted, match=f"{number.name} at step 4, all is saved") as ending:
        fit(module, Send(number, step=3), Interrupt(str(path), requeue_exit_code=99))
    assert ending.value.code == 99
    assert torch.load(path, weights_only=True)["global_step"] == 4
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("code", [0, 256])
def test_exit_codes_are_checked(code: int) -> None:
    with pytest.raises(ValueError, match=f"requeue_exit_code={code} of interrupt must lie in 1 to 255"):
        Interrupt("x", requeue_exit_code=code)


def the_second_rank_is_preempted() -> Any:
    path = shared_folder() / "interrupted.ckpt"
    sender = Send(signal.SIGTERM, step=2) if os.environ["RANK"] == "1" else Send(signal.SIGTERM, step=-1)
    trainer = lightning.Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_steps=STEPS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[sender, Interrupt(str(path))], limit_val_batches=0,
    )  # fmt: skip
    try:
        trainer.fit(Line(), loader())
    except SystemExit as ending:
        return ending.code, trainer.global_step, path.exists()
    return "ran to the end"


@pytest.mark.long
def test_ranks_stop_together() -> None:
    (found,) = run_on_two_ranks(the_second_rank_is_preempted)
    assert found == [(75, 3, True), (75, 3, True)]
