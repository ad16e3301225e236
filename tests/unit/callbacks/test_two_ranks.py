"""Safeguards on two gloo ranks of which only rank 1 sees the fault: both do the same, and none waits for the other.

The scenarios run in one pair of processes; the tests below read what each rank returned.
"""

import math
import os
from datetime import timedelta
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from callbacks.chunk_size_scheduler import ChunkSizeScheduler
from callbacks.nonfinite_guard import NonfiniteGuard
from callbacks.persistent_memory_check import PersistentMemoryCheck
from callbacks.proactive_clipping import ProactiveClipping
from tests.support.toys import STEPS, Line, loader
from tests.support.two_ranks import run_on_two_ranks, shared_folder
from tests.unit.callbacks.test_chunk_size_scheduler import HALVING, Chunked, halving
from tests.unit.callbacks.test_gate_monitor import Gated, monitor, spread
from tests.unit.callbacks.test_loss_weight_schedule import Weighted, schedule
from tests.unit.callbacks.test_persistent_memory_check import Remembering, tampered


def is_rank_1() -> bool:
    return os.environ["RANK"] == "1"


def train(module: Line, *callbacks: Any, ckpt_path: Any = None, **changes: Any) -> dict[str, Any]:
    """What became of a run: what was raised, how many batches it took, the weights; the Trainer is not picklable."""
    trainer = lightning.Trainer(
        callbacks=list(callbacks), accelerator="cpu", devices=2,
        strategy=changes.pop("strategy", None) or DDPStrategy(timeout=timedelta(seconds=30)),
        max_steps=changes.pop("max_steps", STEPS), logger=False, enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=shared_folder(),
        num_sanity_val_steps=0, limit_val_batches=changes.pop("limit_val_batches", 0), log_every_n_steps=1, **changes,
    )  # fmt: skip
    raised = None
    try:
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        assert trainer.world_size == 2
    except (ValueError, FloatingPointError) as error:
        raised = f"{type(error).__name__}: {error}"
    weights = [p.tolist() for p in module.parameters() if not isinstance(p, DTensor)]
    return {"raised": raised, "batches": len(module.seen), "weights": weights, "trainer": trainer}


def summary(run: dict[str, Any], **more: Any) -> dict[str, Any]:
    del run["trainer"]
    return {**run, **more}


# Scenarios


class LossOn1(Line):
    """Adds `bad[step]` to the loss, or multiplies it, on rank 1 only."""

    def __init__(self, bad: dict[int, float], add: bool = False) -> None:
        super().__init__()
        self.faults, self.add = bad, add

    def training_step(self, batch: Any, index: int) -> Any:
        loss, fault = super().training_step(batch, index), self.faults.get(self.global_step)
        if fault is None or not is_rank_1():
            return loss
        return loss + fault if self.add else loss * fault


class Steps(lightning.Callback):
    """The first weight after each step."""

    def __init__(self) -> None:
        self.weight: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weight.append(float(pl_module.layer.weight[0, 0]))


class GradientOn1(Line):
    """Rank 1 alone sees a NaN, after the reduction: only a vote can tell rank 0."""

    def on_after_backward(self) -> None:
        if self.global_step == 3 and is_rank_1():
            self.layer.weight.grad.view(-1)[1] = math.nan


def guard_skips_a_gradient() -> Any:
    guard, steps = NonfiniteGuard(1), Steps()
    return summary(train(GradientOn1(), guard, steps), skipped=guard.skipped, steps=steps.weight)


def guard_skips_a_loss() -> Any:
    guard, steps = NonfiniteGuard(1), Steps()
    return summary(train(LossOn1({3: math.nan}), guard, steps), skipped=guard.skipped, steps=steps.weight)


def guard_stops() -> Any:
    return summary(train(LossOn1({1: math.inf, 2: math.inf}, add=True), NonfiniteGuard(1)))


def chunks_agree() -> Any:
    module, scheduler = Chunked(chunks=(4, 4) if is_rank_1() else (8, 16)), halving()
    return summary(train(module, scheduler), used=module.used, transitions=scheduler.transitions)


def clipping_agrees() -> Any:
    """Only rank 1's loss is large."""

    class Both(LossOn1):
        local_chunks = (32,)

    clipping = ProactiveClipping(kappa_base=1e3)
    run = train(Both({2: 1e6, 5: 1e6}), clipping)
    return summary(run, clips=clipping.clips, kappa=run["trainer"].gradient_clip_val)


def gates_stop() -> Any:
    return summary(train(Gated({3: spread(math.nan)} if is_rank_1() else None), monitor()))


def gates_share_their_statistics() -> Any:
    """Rank 1's gates stay as they are while rank 0's spread: together the variance grows 1.25 times only."""
    gates = monitor()
    return summary(
        train(Gated({4: spread(0.1)} if is_rank_1() else {4: spread(0.1 * 1.5**0.5)}), gates), baseline=gates.baseline
    )


def loss_weights_rest() -> Any:
    module = Weighted({2: math.nan} if is_rank_1() else {})
    return summary(train(module, schedule()), used=module.used)


def loss_weights_share_their_average() -> Any:
    """1.2 here and 1.0 there are 1.1: too much. 1.06 and 1.0 are 1.03: fine."""
    module = Weighted({1: 1.06, 4: 1.2} if is_rank_1() else {})
    weights = schedule()
    return summary(train(module, weights), used=module.used, state=weights.state_dict())


class MemoryOn1(lightning.Callback):
    """A bit of rank 1's memory flips after DDP's own synchronisation."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if is_rank_1():
            pl_module.layer.weight.data[0, 0] += 1e-3


def memories_differ() -> Any:
    return summary(train(Remembering(), MemoryOn1(), PersistentMemoryCheck()))


def memories_are_resumed() -> Any:
    path = shared_folder() / "memory.ckpt"
    run = train(Remembering(), PersistentMemoryCheck(), max_steps=4)
    run["trainer"].save_checkpoint(path)
    fine = train(Remembering(), PersistentMemoryCheck(), ckpt_path=path)
    if not is_rank_1():
        tampered(path, by=1e-3)
    run["trainer"].strategy.barrier()
    wrong = train(Remembering(), PersistentMemoryCheck(), ckpt_path=path)
    return summary(run), summary(fine), summary(wrong)


class Sharded(Line):
    """Parameters in shards (FSDP2): rank 1 holds half of `more`, nothing of the layer, and the NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(4, 4)
        self.local_chunks = (32,)
        self.norms: list[float] = []  # of whole gradients, where there are any

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        whole = [p.grad.full_tensor() for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(whole)))

    def configure_model(self) -> None:
        for part in (self.more, self.layer):
            fully_shard(part, mesh=self.trainer.strategy.device_mesh["data_parallel"])  # type: ignore[union-attr]

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layer(self.more(batch)).square().mean()

    def persistent_memory(self) -> list[Any]:
        return [self.more.weight]

    def on_after_backward(self) -> None:
        if self.global_step == 3 and is_rank_1():
            self.more.weight.grad.to_local().view(-1)[1] = math.nan


KAPPA = 20.0


def shards_agree() -> Any:
    module, guard, clipping = Sharded(), NonfiniteGuard(1), ProactiveClipping(kappa_base=KAPPA)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, timeout=timedelta(seconds=30))
    run = train(module, guard, clipping, PersistentMemoryCheck(), strategy=strategy)
    found = torch.cat([p.full_tensor().flatten() for p in run["trainer"].lightning_module.parameters()])
    return {
        "raised": run["raised"],
        "skipped": guard.skipped,
        "clips": clipping.clips,
        "norms": module.norms,
        "weights": found.tolist(),
    }


class Everything(Chunked, Gated, Weighted, Remembering):
    """A healthy module that all six know."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = {0: spread(0.1), 4: spread(0.2)}  # type: ignore[assignment]

    def training_step(self, batch: Any, index: int) -> Any:
        self.gates = self.plan.get(self.global_step + 1, self.gates)
        self.log("watched", 1.0)
        loss = Line.training_step(self, batch, index) * sum(self.local_chunks)
        return loss + self.loss_weights["pull"] * (self.layer.weight - 1).square().sum()


def healthy_with_and_without() -> Any:
    with_all, without = Everything(), Everything()
    without.loss_weights["pull"] = 2.0
    six = [
        NonfiniteGuard(0), ChunkSizeScheduler(start=[8, 16], total_steps=8, gamma=1.0), ProactiveClipping(1e9),
        monitor(), schedule(), PersistentMemoryCheck(),
    ]  # fmt: skip
    runs = train(with_all, *six), train(without)
    moments = [
        [value.tolist() for state in run["trainer"].optimizers[0].state.values() for value in state.values()]
        for run in runs
    ]
    return [summary(run, moments=found) for run, found in zip(runs, moments, strict=True)]


SCENARIOS = (
    guard_skips_a_gradient, guard_skips_a_loss, guard_stops, chunks_agree, clipping_agrees, gates_stop,
    gates_share_their_statistics, loss_weights_rest, loss_weights_share_their_average, memories_differ,
    memories_are_resumed, shards_agree, healthy_with_and_without,
)  # fmt: skip


# What the ranks returned


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    found = run_on_two_ranks(*SCENARIOS)
    return {scenario.__name__: both for scenario, both in zip(SCENARIOS, found, strict=True)}


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_both_ranks_did_the_same(results: dict[str, list[Any]], scenario: Any) -> None:
    first, second = results[scenario.__name__]
    if scenario is memories_differ:  # its weights differ by design
        first, second = first["raised"], second["raised"]
    assert first == second


@pytest.mark.long
@pytest.mark.parametrize("scenario", [guard_skips_a_gradient, guard_skips_a_loss])
def test_the_guard_skips_on_both(results: dict[str, list[Any]], scenario: Any) -> None:
    for run in results[scenario.__name__]:
        assert run["raised"] is None
        assert run["skipped"] == 1
        same = [i for i in range(1, STEPS) if run["steps"][i] == run["steps"][i - 1]]
        assert same == [3]
        assert all(map(math.isfinite, run["steps"]))


@pytest.mark.long
def test_the_guard_stops_both_and_names_the_rank(results: dict[str, list[Any]]) -> None:
    for run in results["guard_stops"]:
        assert run["raised"].startswith(
            "NonFiniteTraining: NaN or infinity in step 1 (loss on rank 1), step 2 (loss on"
        )
        assert run["batches"] == 3


@pytest.mark.long
def test_chunks_are_the_schedules_on_both(results: dict[str, list[Any]]) -> None:
    for run in results["chunks_agree"]:
        assert run["used"] == HALVING
        assert run["transitions"] == 5


@pytest.mark.long
def test_both_clip_when_one_loss_is_large(results: dict[str, list[Any]]) -> None:
    for run in results["clipping_agrees"]:
        assert run["clips"] == 2
        assert run["kappa"] == 1e3


@pytest.mark.long
def test_gates_of_one_rank_stop_both(results: dict[str, list[Any]]) -> None:
    for run in results["gates_stop"]:
        assert run["raised"].startswith("GateFailure: gates of layer 0 are NaN or infinite at step 3")
        assert run["batches"] == 3
    for run in results["gates_share_their_statistics"]:
        assert run["raised"].startswith(
            "GateFailure: gates do not spread at step 5, least in layer 0: variance 0.01 → 0.0125"
        )
        assert run["baseline"] == pytest.approx([0.01, 0.01])


@pytest.mark.long
def test_a_metric_of_one_rank_rests_the_weights_of_both(results: dict[str, list[Any]]) -> None:
    for run in results["loss_weights_rest"]:
        assert run["used"] == [2, 2, 2, 0, 0, 1, 1, 1]
    for run in results["loss_weights_share_their_average"]:
        assert run["used"] == [2, 2, 2, 2, 2, 0, 0, 1]


@pytest.mark.long
def test_a_memory_that_differs_stops_both(results: dict[str, list[Any]]) -> None:
    for run in results["memories_differ"]:
        assert run["raised"].startswith("PersistentMemoryDiffers: the persistent memory differs between ranks: rank 0 ")
        assert ", rank 1 " in run["raised"]
        assert run["batches"] == 0


@pytest.mark.long
def test_memories_are_compared_with_the_checkpoint(results: dict[str, list[Any]]) -> None:
    for first, fine, wrong in results["memories_are_resumed"]:
        assert first["raised"] is fine["raised"] is None
        assert fine["batches"] == 4
        assert wrong["raised"].startswith("PersistentMemoryDiffers: the persistent memory was saved as ")
        assert wrong["batches"] == 0


@pytest.mark.long
def test_shards_are_judged_together(results: dict[str, list[Any]]) -> None:
    for run in results["shards_agree"]:
        assert run["raised"] is None
        assert run["skipped"] == 1
        assert STEPS > run["clips"] == sum(norm > KAPPA for norm in run["norms"]) > 0
        assert all(map(math.isfinite, run["weights"]))


@pytest.mark.long
def test_a_healthy_run_is_bitwise_the_same_with_all_six(results: dict[str, list[Any]]) -> None:
    for with_all, without in results["healthy_with_and_without"]:
        assert with_all["raised"] is without["raised"] is None
        assert with_all == without
        assert with_all["batches"] == STEPS
        assert torch.tensor(with_all["weights"][0]).isfinite().all()
