"""ChunkSizeScheduler: sizes exactly as the formula says, set at step ends, and back again after a rollback."""

import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning
import pytest

from callbacks.chunk_size_scheduler import ChunkSizeScheduler
from tests.support.toys import Line, Lines


class Chunked(Line):
    """What it learns depends on the sizes of its chunks."""

    def __init__(self, chunks: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        self.local_chunks = chunks
        self.used: list[tuple[int, ...]] = []

    def set_local_chunks(self, chunks: tuple[int, ...]) -> None:
        self.local_chunks = tuple(chunks)

    def training_step(self, batch: Any, index: int) -> Any:
        self.used.append(self.local_chunks)
        return super().training_step(batch, index) * sum(self.local_chunks)


HALVING = [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]


def halving(**changes: Any) -> ChunkSizeScheduler:
    """Another size at each of the first steps."""
    return ChunkSizeScheduler(**{"start": 32, "total_steps": 8, "gamma": 0.5, **changes})


# The formulas


def test_the_sizes_of_the_specification() -> None:
    sizes = ChunkSizeScheduler(start=32, total_steps=5000).chunk_sizes
    assert [sizes(step) for step in (0, 1000, 2000, 5000, 10000)] == [(32,), (15,), (7,), (1,), (1,)]


@pytest.mark.parametrize(("start", "gamma"), [(100, 0.7), (10, 0.1), (1000, 0.9), (64, 0.25), (125, 0.2), (49, 1.0)])
def test_floors_are_exact_where_floats_are_not(start: int, gamma: float) -> None:
    scheduler = ChunkSizeScheduler(start=start, total_steps=100, gamma=gamma)
    exact = [max(1, math.floor(start * Fraction(str(gamma)) ** step)) for step in range(200)]
    assert [scheduler.chunk_sizes(step)[0] for step in range(200)] == exact


def test_a_float_would_be_wrong_there() -> None:
    assert math.floor(100 * 0.7**2) == 48
    assert ChunkSizeScheduler(start=100, total_steps=9, gamma=0.7).chunk_sizes(2) == (49,)


def test_every_memory_has_its_own_size() -> None:
    scheduler = ChunkSizeScheduler(start=[8, 64], total_steps=9, gamma=0.5)
    assert [scheduler.chunk_sizes(step) for step in (0, 1, 3, 6)] == [(8, 64), (4, 32), (1, 8), (1, 1)]


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(32, 1, 4950), (32, 1, 400), ([4, 32], 1, 50), (64, 4, 33), (3, 3, 5)]
)
def test_a_derived_gamma_ends_with_the_run(start: Any, end: int, steps: int) -> None:
    scheduler = ChunkSizeScheduler(start=start, total_steps=steps, gamma="auto", end=end)
    largest = max(scheduler.start)
    assert float(scheduler.gamma) ** (steps - 1) * largest == pytest.approx(end)
    assert max(scheduler.chunk_sizes(steps - 1)) == end
    assert scheduler.hard_size(largest, 0) == largest
    if steps == 4950:
        assert float(scheduler.gamma) == pytest.approx(0.9993, abs=1e-6)


def test_a_derived_gamma_meets_whole_sizes_on_its_way() -> None:
    """It is a root, cut off after so many digits: 64 · γ is 31.99…"""
    halves = ChunkSizeScheduler(start=64, total_steps=7, gamma="auto")
    assert [halves.chunk_sizes(step)[0] for step in range(7)] == [64, 32, 16, 8, 4, 2, 1]


def test_steps_and_cosine() -> None:
    steps = ChunkSizeScheduler(start=[32, 5], total_steps=100, schedule="step", step_every=10)
    assert [steps.chunk_sizes(t) for t in (0, 9, 10, 20, 99)] == [(32, 5), (32, 5), (16, 2), (8, 1), (1, 1)]
    cosine = ChunkSizeScheduler(start=33, total_steps=101, schedule="cosine", end=1)
    assert [cosine.chunk_sizes(t)[0] for t in (0, 50, 100, 1000)] == [33, 17, 1, 1]
    sizes = [cosine.chunk_sizes(t)[0] for t in range(101)]
    assert sizes == sorted(sizes, reverse=True)


def test_soft_boundaries_interpolate_linearly() -> None:
    hard = {"start": 32, "total_steps": 100, "schedule": "step", "step_every": 20, "end": 8}
    soft = ChunkSizeScheduler(**hard, transition_steps=4)
    assert [soft.chunk_sizes(t)[0] for t in range(18, 27)] == [32, 32, 28, 24, 20, 16, 16, 16, 16]
    assert [soft.chunk_sizes(t)[0] for t in range(38, 46)] == [16, 16, 14, 12, 10, 8, 8, 8]
    for scheduler in (ChunkSizeScheduler(**hard, transition_steps=1), ChunkSizeScheduler(**hard)):
        assert [scheduler.chunk_sizes(t)[0] for t in (19, 20)] == [32, 16], "off by default"


def test_soft_boundaries_stay_between_the_sizes() -> None:
    soft, hard = (ChunkSizeScheduler(start=32, total_steps=99, gamma=0.8, transition_steps=k) for k in (7, 0))
    for t in range(40):
        assert isinstance(soft.chunk_sizes(t)[0], int)
        assert hard.chunk_sizes(t)[0] <= soft.chunk_sizes(t)[0] <= hard.chunk_sizes(max(0, t - 7))[0]


# In training


def test_each_step_uses_its_sizes_and_changes_are_reported(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    module, scheduler, lines = Chunked(), halving(), Lines()
    with caplog.at_level(logging.INFO, "callbacks.chunk_size_scheduler"):
        fit(module, scheduler, logger=lines, log_every_n_steps=16)
    assert module.used == HALVING
    assert scheduler.transitions == 5
    reported = [text for name, _, text in caplog.record_tuples if name == "callbacks.chunk_size_scheduler"]
    assert len(reported) == 5
    assert reported[0] == "step 1: local chunk sizes [32, 32] → [16, 16]"
    recorded = [
        (step, row["chunk_size_scheduler/chunk_size"])
        for step, row in lines.rows
        if "chunk_size_scheduler/chunk_size" in row
    ]
    assert recorded == [(1, 16.0), (2, 8.0), (3, 4.0), (4, 2.0), (5, 1.0)]


def test_the_largest_size_is_logged_at_every_step(fit: Any) -> None:
    lines = Lines()
    fit(Chunked(), ChunkSizeScheduler(start=[8, 16], total_steps=8, gamma=1.0), logger=lines)
    assert [
        row["chunk_size_scheduler/chunk_size"] for _, row in lines.rows if "chunk_size_scheduler/chunk_size" in row
    ] == [16.0] * 8


def test_sizes_change_only_between_accumulation_windows(fit: Any) -> None:
    module = Chunked()
    fit(module, halving(), accumulate_grad_batches=2, max_steps=4)
    assert module.used == [size for size in HALVING[:4] for _ in range(2)]


def test_sizes_go_back_with_the_step(fit: Any) -> None:
    """As a rollback does it: counters and callbacks' states of an earlier moment, while the module stays as it is."""
    module, scheduler = Chunked(), halving()

    class Back(lightning.Callback):
        state: Any = None

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
            if trainer.global_step == 2 and self.state is None:
                self.state = (progress.state_dict(), scheduler.state_dict())
            if trainer.global_step == 4 and len(module.used) == 4:
                progress.load_state_dict(self.state[0])
                scheduler.load_state_dict(self.state[1])

    fit(module, scheduler, Back(), max_steps=5)
    assert module.used == [*HALVING[:4], *HALVING[2:5]]
    assert scheduler.transitions == 4, "those of the timeline that counts"


def test_it_is_bitwise_inert_while_sizes_stay(fit: Any, same_training: Any) -> None:
    constant = ChunkSizeScheduler(start=[8, 16], total_steps=8, gamma=1.0)
    same_training(fit(Chunked(), constant), fit(Chunked()))
    assert constant.transitions == 0


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_a_resumed_run_continues(fit: Any, tmp_path: Path) -> None:
    fit(Chunked(), halving(), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    module, scheduler = Chunked(), halving()
    fit(module, scheduler, ckpt_path=tmp_path / "4.ckpt")
    assert module.used == HALVING[4:]
    assert scheduler.transitions == 5, "as many as without the break"


# Refusals


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"start": 0}, r"start=0 .*at least 1 token"),
        ({"start": []}, r"start=\[\] "),
        ({"total_steps": 0}, "total_steps=0"),
        ({"schedule": "linear"}, "schedule=linear .*geometric, step or cosine"),
        ({"gamma": 0.0}, "gamma=0.0 .*auto"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"gamma": "fast"}, "gamma=fast"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"end": 0}, "end=0 .*at least 1"),
        ({"start": [4, 64], "end": 5}, "end=5 .*smallest start, 4"),
        ({"schedule": "step"}, "step_every=None"),
        ({"schedule": "step", "step_every": 0}, "step_every=0"),
        ({"step_every": 10}, "step_every=10"),
        ({"transition_steps": -1}, "transition_steps=-1"),
    ],
)
def test_values_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        halving(**changes)


def test_the_module_is_checked_before_step_0(fit: Any, line: Any) -> None:
    with pytest.raises(TypeError, match=r"needs local_chunks and set_local_chunks, which Line lacks"):
        fit(line(), halving())
    with pytest.raises(ValueError, match=r"start=\[1, 2, 3\] .* does not fit 2 local memories"):
        fit(Chunked(), halving(start=[1, 2, 3]))
    with pytest.raises(ValueError, match="does not fit 0 local memories"):
        fit(Chunked(chunks=()), halving())
