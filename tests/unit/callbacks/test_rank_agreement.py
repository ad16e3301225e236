"""RankAgreement: the first parameter in which a rank differs is named, on all ranks, before a checkpoint holds it."""

import logging
import os
from datetime import timedelta
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from callbacks.rank_agreement import RankAgreement, RanksDiverged, RankState
from tests.support.toys import STEPS, Line, Lines, loader
from tests.support.two_ranks import run_on_two_ranks, shared_folder
from tests.unit.callbacks.test_two_ranks import Sharded, summary, train
from tests.unit.callbacks.test_weight_integrity import flip


def states(*parameters: dict[str, int], buffers: Any = None, changed: Any = None) -> list[RankState]:
    count = len(parameters)
    return [
        RankState(*three)
        for three in zip(parameters, buffers or [{}] * count, changed or [{}] * count, strict=True)
    ]  # fmt: skip


SAME = {"a": 1, "b": 2, "c": 3}


# The judgement, on plain numbers


def test_ranks_that_agree_are_left_alone() -> None:
    check = RankAgreement()
    check.judge(states(SAME, SAME, SAME), 100)
    assert check.agreed == 100


def test_who_differs_from_the_majority_is_named() -> None:
    check = RankAgreement()
    check.judge(states(SAME, SAME, SAME), 100)
    with pytest.raises(RanksDiverged) as caught:
        check.judge(states({**SAME, "b": 5, "c": 6}, SAME, SAME), 200)
    assert str(caught.value) == (
        "at step 200 rank 0 (first in b) differs from the majority; all ranks agreed last at step 100: resume a "
        "checkpoint of step 100 or earlier, later ones are suspect"
    )


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([SAME, {**SAME, "c": 9}], r"step 3 rank 1 \(first in c\) differs from rank 0"),
        (
            [SAME, {**SAME, "c": 9}, {**SAME, "a": 8}],
            r"rank 1 \(first in c\), rank 2 \(first in a\) differ from rank 0",
        ),
        ([SAME, SAME, {**SAME, "a": 8}, {**SAME, "a": 8}], r"rank 2 \(first in a\), rank 3 \(first in a\) differ from"),
    ],
)
def test_without_a_majority_it_is_rank_0_that_counts(held: Any, said: str) -> None:
    with pytest.raises(RanksDiverged, match=said + r".* agreed last never in this run: start all ranks with the same"):
        RankAgreement().judge(states(*held), 3)


@pytest.mark.parametrize(("changed", "fine"), [((True, True), True), ((False, True), False), ((False, False), False)])
def test_a_buffer_that_every_rank_changes_by_itself_is_its_own(changed: Any, fine: bool) -> None:
    both = states(SAME, SAME, buffers=[{"mean": 1}, {"mean": 2}], changed=[{"mean": one} for one in changed])
    if fine:
        RankAgreement().judge(both, 3)
    else:
        with pytest.raises(RanksDiverged, match=r"rank 1 \(first in mean\)"):
            RankAgreement().judge(both, 3)


def test_a_parameter_that_every_rank_changes_is_judged() -> None:
    with pytest.raises(RanksDiverged):
        RankAgreement().judge(states({"a": 1}, {"a": 2}, changed=[{"a": True}] * 2), 3)


def test_an_interval_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 of rank_agreement"):
        RankAgreement(0)


def test_with_one_rank_it_is_silent_and_bitwise_inert(fit: Any, line: Any, same_training: Any) -> None:
    check, lines = RankAgreement(2), Lines()
    same_training(fit(line(), check, logger=lines), fit(line()))
    assert check.agreed is None
    assert check.state_dict() == {}, "it keeps nothing: a new run compares as it starts"


# Two ranks, of which only one is damaged


class FlipOn1(lightning.Callback):
    """One bit of rank 1, at the beginning of a step or of training."""

    def __init__(self, step: int, buffer: bool = False) -> None:
        self.step, self.buffer = step, buffer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.step == -1:
            self.strike(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.strike(pl_module)

    def strike(self, pl_module: Any) -> None:
        self.step = -2  # once
        if os.environ["RANK"] == "1":
            flip(pl_module.constant if self.buffer else pl_module.layer.bias, 3)


class Buffers(Line):
    """A buffer that stays, and statistics that each rank has of its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.ones(3))
        self.norm = nn.BatchNorm1d(1)

    def training_step(self, batch: Any, index: int) -> Any:
        self.norm(batch[:, :1].repeat(2, 1))
        return super().training_step(batch, index) + 0 * self.norm.weight.sum() + 0 * self.norm.bias.sum()


class Saves(lightning.pytorch.callbacks.ModelCheckpoint):
    """A checkpoint after every second step, in a folder of its own; `written` is what there is."""

    def __init__(self, name: str) -> None:
        super().__init__(shared_folder() / name, filename="{step}", save_top_k=-1, every_n_train_steps=2)

    def written(self) -> list[str]:
        return sorted(path.name for path in (shared_folder() / str(self.dirpath)).glob("*.ckpt"))


def own_buffers() -> DDPStrategy:
    """DDP does not overwrite the buffers of rank 1 with those of rank 0."""
    return DDPStrategy(timeout=timedelta(seconds=30), broadcast_buffers=False)


def outcome(module: Line, *callbacks: Any, **changes: Any) -> Any:
    """summary() of a run, or what it raised; how far it came in any case."""
    try:
        run = summary(train(module, *callbacks, **changes))
    except RanksDiverged as error:
        run = {"raised": f"{type(error).__name__}: {error}", "batches": len(module.seen)}
    return run


def diverges_in_training() -> Any:
    saves = Saves("diverges")
    trainer = lightning.Trainer(
        callbacks=[FlipOn1(2), RankAgreement(2), saves], accelerator="cpu", devices=2, strategy=own_buffers(),
        max_steps=STEPS, logger=False, enable_model_summary=False, enable_progress_bar=False,
        default_root_dir=shared_folder(), num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    module = Line()
    try:
        trainer.fit(module, loader())
    except RanksDiverged as error:
        return str(error), len(module.seen), saves.written()
    return None


def diverges_at_the_start() -> Any:
    return outcome(Line(), FlipOn1(-1), RankAgreement())


def diverges_at_the_end() -> Any:
    return outcome(Line(), FlipOn1(6), RankAgreement(5))


def diverges_in_a_buffer() -> Any:
    return outcome(Buffers(), FlipOn1(3, buffer=True), RankAgreement(2), strategy=own_buffers())


def diverges_within_a_window() -> Any:
    return outcome(Line(), FlipOn1(1), RankAgreement(1), accumulate_grad_batches=4, max_steps=2)


class Logged(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def shards() -> Any:
    heard = Logged()
    log = logging.getLogger("callbacks.rank_agreement")
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    run = outcome(Sharded(), RankAgreement(2), strategy=strategy)
    log.removeHandler(heard)
    return run["raised"], heard.lines


def healthy() -> Any:
    check = RankAgreement(2)
    ours = outcome(Buffers(), check, strategy=own_buffers())
    return ours, outcome(Buffers(), strategy=own_buffers()), check.agreed


SCENARIOS = (
    diverges_in_training, diverges_at_the_start, diverges_at_the_end, diverges_in_a_buffer, diverges_within_a_window,
    shards, healthy,
)  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return {s.__name__: both for s, both in zip(SCENARIOS, run_on_two_ranks(*SCENARIOS), strict=True)}


@pytest.mark.long
def test_both_stop_before_the_checkpoint_that_would_hold_it(results: dict[str, list[Any]]) -> None:
    for message, batches, written in results["diverges_in_training"]:
        assert message == (
            "at step 4 rank 1 (first in layer.bias) differs from rank 0; all ranks agreed last at step 2: resume a "
            "checkpoint of step 2 or earlier, later ones are suspect"
        )
        assert batches == 4
        assert written == ["step=2.ckpt"]


@pytest.mark.long
def test_what_training_starts_from_is_compared(results: dict[str, list[Any]]) -> None:
    for run in results["diverges_at_the_start"]:
        assert run["raised"].startswith("RanksDiverged: at step 0 rank 1 (first in layer.bias) differs from rank 0; ")
        assert "never in this run: start all ranks with the same seed" in run["raised"]
        assert run["batches"] == 0


@pytest.mark.long
def test_what_it_ends_with_is_compared(results: dict[str, list[Any]]) -> None:
    for run in results["diverges_at_the_end"]:
        assert "at step 8 rank 1 (first in layer.bias)" in run["raised"]
        assert "at step 5: resume" in run["raised"]


@pytest.mark.long
def test_a_buffer_counts(results: dict[str, list[Any]]) -> None:
    for run in results["diverges_in_a_buffer"]:
        assert "at step 4 rank 1 (first in constant)" in run["raised"]


@pytest.mark.long
def test_it_compares_between_two_steps_only(results: dict[str, list[Any]]) -> None:
    for run in results["diverges_within_a_window"]:
        assert "at step 2 rank 1" in run["raised"]
        assert run["batches"] == 8


@pytest.mark.long
def test_of_shards_there_is_nothing_to_compare(results: dict[str, list[Any]]) -> None:
    said = "rank_agreement: every parameter and buffer is sharded, there is nothing to compare"
    assert results["shards"] == [(None, [said]), (None, [])]


@pytest.mark.long
def test_healthy_ranks_train_as_without_it(results: dict[str, list[Any]]) -> None:
    for ours, theirs, agreed in results["healthy"]:
        assert ours == theirs
        assert ours["raised"] is None
        assert ours["batches"] == agreed == STEPS
