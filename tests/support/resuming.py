"""Runs that end in the middle, and whether one that was resumed is the uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.training.module import AtlasModule
from tests.support.launching import report_of

# Evaluations, saves, validations and epochs (14 batches) all fall on different steps, and together on some.
OFTEN = [
    "optim.total_steps=24", "trainer.val_check_interval=6", "callbacks.step_checkpoint.every_n_steps=3",
    "callbacks.spike_rollback.every_n_steps=4", "callbacks.niah_probe.every_n_steps=5",
    "callbacks.niah_probe.needles=1", "callbacks.niah_probe.haystack=4",
    "callbacks.memory_contribution.every_n_steps=7", "callbacks.spike_rollback.threshold=0.5",
]  # fmt: skip
TIMED = ("time", "tokens_per_second", "perf/", "niah_probe/overhead", "seq")  # differ between any two runs


def comparable(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without what no two runs share; `seq` has to count through."""
    rows = read_rows(run / "metrics.jsonl")
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    assert len({row["step"] for row in rows}) == len(rows), "a step was written twice"
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def scalars(run: Path) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard shows of a run: by name the steps and, of single numbers, the values."""
    board = EventAccumulator(str(run / "tensorboard"), tensor_size_guidance={"": 0})
    board.Reload()
    names = [name for name in board.Tags()["tensors"] if not name.startswith((*TIMED, "_hparams_"))]
    assert {"niah_probe/layer_by_depth", "memory/gate/layer_0", "sample/text_summary", "train/loss"} <= {*names}
    return {name: [(event.step, number(event)) for event in board.Tensors(name)] for name in names}


def number(event: Any) -> str:
    value = make_ndarray(event.tensor_proto)
    return str(value) if value.ndim == 0 else ""


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights, moments, schedule, records and report."""
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "global_step"):
        assert_equal(a[part], b[part], part)
    for one, other in zip(comparable(ours), comparable(theirs), strict=True):
        different = {name: (one.get(name), other.get(name)) for name in {*one, *other}}
        assert {name: both for name, both in different.items() if both[0] != both[1]} == {}, one["step"]
    assert scalars(ours) == scalars(theirs)
    for name in ("status", "val_loss", "steps", "tokens", "rollbacks", "needle_accuracy", "memory_contribution"):
        assert report_of(ours)[name] == report_of(theirs)[name], name


def assert_equal(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


class Killed(BaseException):
    """Ends a run in this process as abruptly as possible: no handler of a run catches it."""


def die_at(batch: int, monkeypatch: pytest.MonkeyPatch, how: Any, kind: Any = AtlasModule) -> None:
    """`how()` in the middle of this training step."""
    step, seen = kind.training_step, []

    def dying(self: Any, data: Any, index: int) -> Any:
        seen.append(index)
        if len(seen) == batch:
            how()
        return step(self, data, index)

    monkeypatch.setattr(kind, "training_step", dying)
