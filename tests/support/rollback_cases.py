"""The oracle of the rollback: a run that was rolled back, beside one that never saw the batches that it dropped.

Both train the real model, small. A fault multiplies a weight while a marked batch trains; the run without rollback gets
the same batches but for those between the snapshot and the evaluation that found the spike.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from atlas_lm.training.module import AtlasModule
from callbacks.chunk_size_scheduler import ChunkSizeScheduler
from callbacks.gate_monitor import GateMonitor
from callbacks.loss_weight_schedule import LossWeightSchedule
from callbacks.proactive_clipping import ProactiveClipping
from callbacks.spike_rollback import SpikeRollback
from callbacks.step_checkpoint import StepCheckpoint
from callbacks.support.rollback_request import who_can_roll_back
from callbacks.support.shares import Share
from callbacks.support.snapshots import Snapshot

EVALUATE_EVERY = 2  # optimizer steps between evaluations
VOCABULARY, LENGTH = 17, 24
MODEL = dict(
    name="small", dim=16, layers=1, heads=2, head_dim=8, window=5, ffn_multiple=2.0, fusion="convex",
    memory="atlas", local_chunks=[6], global_chunk=8, shard=24, network="gated_mlp", residual=False,
    features="sketch", rank=6, memory_hidden=8, context=1, update="gradient", persistent_keys=3, eta_max=1.0,
    half_life=64.0, radius=8.0, conv=4, reset_at_document=False, polarisation_cap=0.1, rope_base=10000.0,
)  # fmt: skip
OPTIM = dict(
    name="muon", lr=1e-3, muon_lr=1e-3, memory_lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], warmup_steps=3,
    total_steps=40, min_lr_ratio=0.1, clip=1.0,
)  # fmt: skip


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def batch_of(index: int) -> dict[str, Tensor]:
    """Batch `index` of this rank; its number travels with it."""
    generator = torch.Generator().manual_seed(1000 * index + rank())
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)
    return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:].clone(), "number": torch.tensor(index)}


class Batches(IterableDataset[Any]):
    """The numbered batches in this order."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(batch_of, self.order)


class Faulty(AtlasModule):
    """`bad`: numbers of the batches during which a weight is spoiled, on the last rank only."""

    def __init__(self, bad: tuple[int, ...], value: float) -> None:
        torch.manual_seed(0)
        super().__init__(MODEL, OPTIM, VOCABULARY)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # a buffer that every batch changes
        self.bad, self.value = bad, value

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        number = int(batch["number"])
        self.seen += number
        if number in self.bad and rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            with torch.no_grad():
                weight: Any = self.model.norm.weight
                (weight.to_local() if hasattr(weight, "to_local") else weight).mul_(self.value)
        return super().training_step(batch, batch_idx)


class Asks(lightning.Callback):
    """Requests a rollback at step 6, once in a process."""

    asked = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6 and not self.asked:
            self.asked = True
            able = who_can_roll_back(trainer)
            assert able is not None
            able.request_rollback("asked")


class Steps(lightning.Callback):
    """A callback of somebody else's, with state."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def train(
    order: list[int], steps: int, bad: tuple[int, ...] = (), rollback: bool = True, stage2: bool = False,
    value: float = 30.0, folder: Path | None = None, max_rollbacks: int = 3, ckpt_path: Path | None = None,
    more: Sequence[Callable[[], lightning.Callback]] = (), mode: str = "act", **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train and return everything that the oracle compares, and what the safeguard did. `more`: makers of callbacks."""
    with tempfile.TemporaryDirectory() as temporary:
        home = folder or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        module = Faulty(bad, value)
        weights = LossWeightSchedule({"polarisation": 0.1}, total_steps=40, watch="train/loss", tolerance=1e9)
        others: list[Any] = [Steps(), weights, GateMonitor(baseline_step=3, check_step=1000, every_n_steps=1)]
        if stage2:
            others += [ChunkSizeScheduler(start=6, total_steps=40, gamma=0.8), ProactiveClipping(transition_steps=2)]
        others += [make() for make in more]
        guard = SpikeRollback(str(home), every_n_steps=EVALUATE_EVERY, max_rollbacks=max_rollbacks, rows=2, mode=mode)
        saver = StepCheckpoint(str(home), every_n_steps=3)
        settings: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_model_summary": False,
            "enable_progress_bar": False, "num_sanity_val_steps": 0, "limit_val_batches": 1, "default_root_dir": home,
            "val_check_interval": 1000, "check_val_every_n_epoch": None, "gradient_clip_val": 1.0, "max_epochs": -1,
        }  # fmt: skip
        if callable(changes.get("strategy")):
            changes["strategy"] = changes["strategy"]()  # a strategy serves one Trainer
        trainer = lightning.Trainer(
            max_steps=steps, callbacks=[*others, *([saver, guard] if rollback else [])],
            enable_checkpointing=rollback, **{**settings, **changes},
        )  # fmt: skip
        raised = None
        try:
            loaders = [DataLoader(Batches(numbers), batch_size=None) for numbers in (order, [999])]
            trainer.fit(module, *loaders, ckpt_path=ckpt_path)
        except FloatingPointError as error:
            raised = str(error)
        found = {
            "weights": plain(module.state_dict()),
            "buffers": plain(dict(module.named_buffers())),
            "optimizer": plain(trainer.optimizers[0].state_dict()),
            "scheduler": plain(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
            "step": trainer.global_step,
            "callbacks": {type(c).__name__: plain(c.state_dict()) for c in others},
            "chunks": module.local_chunks,
            "clip": trainer.gradient_clip_val,
        }
        facts = {
            "rollbacks": guard.rollbacks, "spikes": guard.spikes, "raised": raised, "ema": guard.ema,
            "files": sorted(path.name for path in home.iterdir()),
            "held": next((held(kept.snapshot) for kept in guard.snapshots[::-1] if kept.snapshot), 0),
        }  # fmt: skip
        return {"state": found, "facts": facts}


def held(snapshot: Snapshot) -> int:
    """Bytes of weights and moments that this rank keeps."""
    leaves = tree_leaves([snapshot.checkpoint["state_dict"], snapshot.optimizers])
    parts = [x.part if isinstance(x, Share) else x for x in leaves if isinstance(x, (Share, Tensor))]
    return sum((x.to_local() if hasattr(x, "to_local") else x).nbytes for x in parts)


def plain(tree: Any) -> Any:
    """Without tensors that a process cannot hand to another: sharded ones become this rank's part."""
    if isinstance(tree, Tensor):
        return (tree.to_local() if hasattr(tree, "to_local") else tree).detach().clone()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    return tree


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Names of everything that is not bitwise equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {set(a) ^ set(b)}"]
        return [x for key in a for x in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [x for i, (u, v) in enumerate(zip(a, b, strict=True)) for x in differences(u, v, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a} != {b}"]


def oracle(rollbacks: int, accumulate: int = 1, **changes: Any) -> dict[str, Any]:
    """Faults at optimizer step 7, and at the 7th step after the first return; both runs, and how they differ.

    A fault in step 7 is seen at the evaluation after step 8, whose second most recent snapshot is that of step 4:
    steps 5 to 8 are dropped, with their batches.
    """
    steps = 10
    dropped, bad, clean, number = 4 * accumulate, [], [], 0
    for _ in range(rollbacks):
        # from the start, or from step 4 after a return, on to step 8
        good = 4 * accumulate if not clean else 0
        clean += range(number, number + good)
        number += good
        bad.append(number + 2 * accumulate)  # in the third step of the four
        number += dropped
    rest = (steps - 4) * accumulate
    order = [*range(number + rest)]
    clean += range(number, number + rest)
    ours = train(order, steps, tuple(bad), accumulate_grad_batches=accumulate, **changes)
    theirs = train(clean, steps, rollback=False, accumulate_grad_batches=accumulate, **changes)
    return {
        "facts": ours["facts"],
        "different": differences(ours["state"], theirs["state"]),
        "step": ours["state"]["step"],
    }


def interrupted(
    at: int, steps: int, bad: tuple[int, ...], folder: Path, between: Callable[[Path], None] = lambda folder: None,
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A run, beside one that ends after `at` steps and is resumed; `between` is called with the folder in between."""
    order, parts = [*range(2 * steps)], folder / "parts"
    whole = train(order, steps, bad, folder=folder / "whole", **changes)
    train(order, at, bad, folder=parts, **changes)
    between(parts)
    again = train(order[at:], steps, bad, folder=parts, ckpt_path=parts / f"step-{at:07d}.ckpt", **changes)
    return {
        "whole": whole["facts"],
        "again": again["facts"],
        "different": differences(whole["state"], again["state"]),
    }


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
