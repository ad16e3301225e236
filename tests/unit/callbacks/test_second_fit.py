"""The same callback objects in a second fit of a new model, as in k-fold validation: as clean as new ones."""

import copy
import importlib
import inspect
import math
import pkgutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

import callbacks
from callbacks.chunk_size_scheduler import ChunkSizeScheduler
from callbacks.five_cat_probe import FiveCatProbe
from callbacks.gate_monitor import GateMonitor
from callbacks.generation_health import GenerationHealth
from callbacks.hang_watch import HangWatch
from callbacks.interrupt import Interrupt
from callbacks.loss_weight_schedule import LossWeightSchedule
from callbacks.memory_contribution import MemoryContribution
from callbacks.memory_horizon import MemoryHorizon
from callbacks.niah_probe import NiahProbe
from callbacks.nonfinite_guard import NonfiniteGuard
from callbacks.outlier_guard import OutlierGuard
from callbacks.persistent_memory_check import PersistentMemoryCheck
from callbacks.proactive_clipping import ProactiveClipping
from callbacks.progress import TrainingProgress
from callbacks.random_state import RandomState
from callbacks.rank_agreement import RankAgreement
from callbacks.spike_rollback import SpikeRollback
from callbacks.step_checkpoint import StepCheckpoint
from callbacks.weight_integrity import WeightIntegrity
from tests.support.toys import STEPS, Line, Lines

MAKERS = {
    "chunk_size_scheduler": lambda d: ChunkSizeScheduler(8, STEPS, "step", step_every=2),
    "five_cat_probe": lambda d: FiveCatProbe(2, from_epoch=1),
    "gate_monitor": lambda d: GateMonitor(2, 5, every_n_steps=1),
    "generation_health": lambda d: GenerationHealth(Reads(), d, 2),
    "hang_watch": lambda d: HangWatch(20, 600),
    "interrupt": lambda d: Interrupt(f"{d}/interrupted.ckpt"),
    "loss_weight_schedule": lambda d: LossWeightSchedule({"aux": 1.0}, STEPS, watch="train/loss", rest_steps=2),
    "memory_contribution": lambda d: MemoryContribution(2),
    "memory_horizon": lambda d: MemoryHorizon(2),
    "niah_probe": lambda d: NiahProbe(every_n_steps=2, on_failure="warn"),
    "nonfinite_guard": lambda d: NonfiniteGuard(3),
    "outlier_guard": lambda d: OutlierGuard(warm_up=2, window=4),
    "persistent_memory_check": lambda d: PersistentMemoryCheck(),
    "proactive_clipping": lambda d: ProactiveClipping(1e-3, 8, transition_steps=2),
    "progress": lambda d: TrainingProgress({"loss": "train/loss"}, every_n_seconds=1000),
    "random_state": lambda d: RandomState(),
    "rank_agreement": lambda d: RankAgreement(2),
    "spike_rollback": lambda d: SpikeRollback(d, every_n_steps=2, threshold=0.5, cool_down_steps=3),
    "step_checkpoint": lambda d: StepCheckpoint(d, 3),
    "weight_integrity": lambda d: WeightIntegrity(),
}  # fmt: skip
TIMES = {"seconds", "trained", "guard/probe_seconds", "_began", "_trained", "_saved_at", "_started", "_shown", "ring",
         "_seconds", "_since",
         "_stall", "perf/checkpoint_stall_seconds"}  # fmt: skip


class Reads:
    """An inspector that reports the loss of its batch."""

    def inspect(self, module: Any, batch: Any) -> Any:
        return [({"loss": float(module.held_out_loss(batch))}, [], "{}")]


class Everything(Line):
    """Has what any callback asks of a module. `scale`: of the loss; `bad`: steps whose loss is another."""

    def __init__(self, scale: float = 1.0, bad: dict[int, float] | None = None) -> None:
        super().__init__(bad)
        self.scale, self.local_chunks, self.loss_weights = scale, (8,), {"aux": 0.0}

    def training_step(self, batch: Any, index: int) -> Any:
        if self.global_step in (2, 5):
            self.local_chunks = (self.local_chunks[0] // 2,)  # for those that follow changes
        return super().training_step(batch, index) * self.scale

    def set_local_chunks(self, chunks: tuple[int, ...]) -> None:
        self.local_chunks = tuple(chunks)

    def set_loss_weight(self, name: str, weight: float) -> None:
        self.loss_weights[name] = weight

    def held_out_loss(self, batch: Any) -> Any:
        return self.scale * self.layer(batch).square().mean().clamp(max=50)

    def gate_values(self) -> Any:
        return torch.linspace(0.2, 0.3, 10).repeat(2, 1) * self.layer.weight.abs().sum().tanh()

    def memory_shape(self) -> tuple[int, int, int]:
        return 1, 1, 4

    def write_and_read(self, keys: Any, values: Any, query: Any, batch: Any = None) -> Any:
        return query.unsqueeze(1) * self.scale

    def persistent_memory(self) -> list[Any]:
        return [self.layer.weight]

    def offset_cosines(self, batch: Any, offsets: Any) -> Any:
        found = torch.tensor([1.0 if k == 0 else 0.5 for k in offsets])
        return found.repeat(len(batch), 1) * self.layer(batch).tanh().abs()

    def attention_reach(self) -> Any:
        return 1, 1

    def losses_after_restarts(self, batch: Any, distances: Any, block: int) -> Any:
        losses = self.layer(batch)[:, :1].detach().expand(len(batch), block)
        return torch.stack([losses * (2 + i) for i in range(len(distances) + 1)])

    def memory_contribution(self, batch: Any) -> Any:
        loss = self.held_out_loss(batch).detach()
        return loss, loss * 1.1


def simple(value: Any) -> Any:
    """What two objects can be compared by; None for what holds tensors, modules or files."""
    if isinstance(value, (int, float, str, bool, type(None))):
        return "nan" if isinstance(value, float) and math.isnan(value) else value
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: simple(part) for key, part in value.items() if key not in TIMES}
    if hasattr(value, "__iter__"):
        return [simple(part) for part in value]
    return None


def outcome(callback: Any, module: Everything, rows: Lines) -> dict[str, Any]:
    plain = {name: simple(value) for name, value in vars(callback).items() if name not in TIMES and not _is_held(value)}
    values = [
        (step, {k: simple(v) for k, v in row.items() if "second" not in k and "percent" not in k})
        for step, row in rows.rows
    ]
    return {
        "attributes": plain, "state": simple(callback.state_dict()), "metrics": values,
        "weights": [p.tolist() for p in module.parameters()],
    }  # fmt: skip


def _is_held(value: Any) -> bool:
    """Attributes of Lightning's own bar, snapshots, and tensors of a model."""
    return not isinstance(value, (int, float, str, bool, type(None), list, tuple, dict)) or bool(
        isinstance(value, (list, dict)) and value and not isinstance(simple(value), (list, dict))
    )


def run(fit: Any, callback: Any, module: Everything, **changes: Any) -> dict[str, Any]:
    rows = Lines()
    torch.manual_seed(3)
    fit(module, callback, logger=rows, limit_val_batches=1, num_sanity_val_steps=0, **changes)
    return outcome(callback, module, rows)


def set_by_reset(callback: Any) -> list[str]:
    """The attributes that `reset` gives a value; none where a callback keeps nothing."""
    if not hasattr(callback, "reset"):
        return []
    names: list[str] = []

    class Watched(type(callback)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            names.append(name)

    copied = copy.copy(callback)
    object.__setattr__(copied, "__class__", Watched)
    copied.reset()
    assert names
    return names


def test_every_callback_is_tried():
    found = set()
    for info in pkgutil.walk_packages(callbacks.__path__, "callbacks."):
        module = importlib.import_module(info.name)
        found |= {
            name.rsplit(".", 1)[-1]
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if issubclass(kind, lightning.Callback) and (name := kind.__module__).startswith("callbacks.")
        }
    assert found == set(MAKERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_a_second_fit_begins_as_clean_as_with_new_objects(name, fit, tmp_path):
    used = MAKERS[name](str(tmp_path / "used"))
    run(fit, used, Everything(bad={4: math.nan, 6: 1e4} if name != "spike_rollback" else {3: 1e4}))
    for attribute in set_by_reset(used):  # whatever the first fit has left there
        setattr(used, attribute, "of another fit")
    again = run(fit, used, Everything(scale=100.0))
    fresh = run(fit, MAKERS[name](str(tmp_path / "used")), Everything(scale=100.0))
    assert again == fresh


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_fit_continues_with_its_state(name, fit, tmp_path):
    """The same objects or new ones: what the checkpoint holds is what the run continues with."""
    used = MAKERS[name](str(tmp_path / "used"))
    module = Everything()
    trainer = fit(module, used, max_steps=4, limit_val_batches=1)
    path = tmp_path / "four.ckpt"
    trainer.save_checkpoint(path)
    saved = simple(copy.deepcopy(used.state_dict()))
    run(fit, used, Everything(scale=3.0))  # another fit in between
    seen = {}

    class Evaluate(lightning.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            seen["state"] = simple(copy.deepcopy(used.state_dict()))

    fit(Everything(), used, Evaluate(), ckpt_path=path, limit_val_batches=1)
    assert Path(path).exists()
    if name != "persistent_memory_check":  # its state is a hash of the module, checked as it is loaded
        assert seen["state"] == saved
