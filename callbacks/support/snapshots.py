"""The state of a run in memory, and the way back to it inside `fit`.

The oracle (C2): after `restore`, weights, buffers, optimizer moments, schedulers, scaler, step counter and the
other callbacks' state are bitwise those of a run that never saw the batches in between. The data is not touched: it
moves on.

Lightning has no public way to do this; what is private stands in `lightning_internals.py`, and
`tests/unit/callbacks/test_spike_rollback.py` holds it to that oracle.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from callbacks.support.lightning_internals import (
    OPTIMIZER_PROGRESS,
    SCHEDULER_PROGRESS,
    forget_last_save,
    load_checkpoint_hooks,
    restore_all_but_loops,
)
from callbacks.support.probing import reshard
from callbacks.support.shares import Share, in_main_memory, is_replicated, joined, shared

# In main memory: a ring of snapshots has no place on a GPU. Each rank keeps its own shard of what is sharded, and its
# share of what all ranks hold alike.
OPTIONS = StateDictOptions(cpu_offload=True)


class Snapshot(NamedTuple):
    """One moment of a run, complete and independent of what training does next."""

    step: int  # optimizer steps done
    checkpoint: dict[str, Any]  # model and callbacks, in the layout that Lightning's hooks expect of a checkpoint
    buffers: dict[str, Tensor]  # also those that state dicts leave out
    optimizers: list[Any]
    schedulers: list[Any]
    precision: dict[str, Any]  # the loss scaler
    progress: tuple[Any, Any]  # optimizer steps, scheduler steps


def copied(tree: Any) -> Any:
    """A deep copy of nested containers of tensors; sharded tensors stay sharded, and a share is as it was."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().clone()
        return x if isinstance(x, Share) else copy.deepcopy(x)

    return tree_map(leaf, tree)


def take(trainer: Trainer, pl_module: LightningModule) -> Snapshot:
    """The run as it is at this step end; to be called on every rank.

    Callbacks with a true attribute `survives_rollback` are left out: they count what happened, and that stays so.
    """
    replicated = is_replicated(trainer)
    checkpoint: dict[str, Any] = {
        "state_dict": get_model_state_dict(pl_module, options=None if replicated else OPTIONS),
        "callbacks": {c.state_key: c.state_dict() for c in _rewound(trainer)},
        "pytorch-lightning_version": lightning.__version__,
    }
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.on_save_checkpoint(trainer, pl_module, checkpoint)  # averaged weights travel this way
    pl_module.on_save_checkpoint(checkpoint)
    state = checkpoint.pop("state_dict")
    parameters = {name for name, _ in pl_module.named_parameters()}

    def kept(name: str, x: Any) -> Any:
        if not replicated:
            return copied(x)
        return shared(trainer, x) if name in parameters else in_main_memory(x)  # a buffer may differ by rank

    checkpoint = copied(checkpoint) | {"state_dict": {name: kept(name, x) for name, x in state.items()}}
    loop = trainer.fit_loop.epoch_loop
    return Snapshot(
        trainer.global_step,
        checkpoint,
        {name: copied(buffer) for name, buffer in pl_module.named_buffers()},
        [_optimizer_state(trainer, pl_module, optimizer) for optimizer in trainer.optimizers],
        [copied(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        copied(trainer.precision_plugin.state_dict()),
        (
            copied(loop.automatic_optimization.optim_progress.state_dict()),
            copied(loop.scheduler_progress.state_dict()),
        ),
    )


def restore(trainer: Trainer, pl_module: LightningModule, snapshot: Snapshot) -> None:
    """Go back to `snapshot`, which stays usable; to be called on every rank, between two optimizer steps."""
    checkpoint = joined(trainer, copied(snapshot.checkpoint))
    pl_module.on_load_checkpoint(checkpoint)
    reshard(pl_module)
    set_model_state_dict(pl_module, checkpoint["state_dict"])
    load_checkpoint_hooks(trainer, checkpoint)  # as at a resume: averaged weights are in the model's place there
    for callback in _rewound(trainer):
        state = checkpoint["callbacks"].get(callback.state_key)
        if state:
            callback.load_state_dict(state)
    with torch.no_grad():
        for name, buffer in pl_module.named_buffers():
            buffer.copy_(snapshot.buffers[name])
    for optimizer, state in zip(trainer.optimizers, snapshot.optimizers, strict=True):
        _load_optimizer_state(pl_module, optimizer, joined(trainer, copied(state)))
        optimizer.zero_grad(set_to_none=True)
    for config, state in zip(trainer.lr_scheduler_configs, snapshot.schedulers, strict=True):
        config.scheduler.load_state_dict(copied(state))
    trainer.precision_plugin.load_state_dict(copied(snapshot.precision))
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.load_state_dict(copied(snapshot.progress[0]))
    loop.scheduler_progress.load_state_dict(copied(snapshot.progress[1]))
    for callback in trainer.checkpoint_callbacks:  # the steps after this one will be saved again
        forget_last_save(callback)
    # batch_progress, epoch_progress, the loaders and the loggers' step stay: the data and the records move on


def constants(pl_module: LightningModule) -> dict[str, Tensor]:
    """Copies of the buffers that no state dict has: what a process has computed for itself."""
    stored = pl_module.state_dict(keep_vars=True).keys()
    return {name: copied(buffer) for name, buffer in pl_module.named_buffers() if name not in stored}


def restore_file(
    trainer: Trainer, pl_module: LightningModule, path: Path, constants: dict[str, Tensor]
) -> dict[str, Any]:
    """Go back to the moment of a checkpoint, as `restore` does; on every rank, between two optimizer steps.

    A file holds the callbacks' state of rank zero: one that has another state on each rank has a method
    `after_restored_file`. Returns the checkpoint's content. Raises what the strategy does where it cannot be read:
    nothing was changed then, except where shards had been filled in already.
    """
    reshard(pl_module)
    checkpoint = trainer.strategy.load_checkpoint(path)
    restore_all_but_loops(trainer, checkpoint)
    for callback in _rewound(trainer):
        state = checkpoint["callbacks"].get(callback.state_key)
        if state:
            callback.load_state_dict(copied(state))
    buffers = dict(pl_module.named_buffers())
    with torch.no_grad():
        for name, buffer in constants.items():
            buffers[name].copy_(buffer)
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loop, saved = trainer.fit_loop.epoch_loop, checkpoint["loops"]["fit_loop"]
    loop.automatic_optimization.optim_progress.load_state_dict(saved[OPTIMIZER_PROGRESS])
    loop.scheduler_progress.load_state_dict(saved[SCHEDULER_PROGRESS])
    for callback in trainer.checkpoint_callbacks:
        forget_last_save(callback)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        after = getattr(callback, "after_restored_file", None)
        if after is not None:
            after(trainer, pl_module)
    return checkpoint


def _rewound(trainer: Trainer) -> list[Any]:
    """Without those that count what has happened, and Lightning's clock, which would count the same time twice."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if not (getattr(c, "survives_rollback", False) or isinstance(c, Timer))]


def _optimizer_state(trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
    """Moments and groups. Before the first step there are no moments, and asking for them would make some."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if not optimizer.state:
        moments = None
    elif is_replicated(trainer):
        moments = shared(trainer, get_optimizer_state_dict(pl_module, optimizer))
    else:
        moments = copied(get_optimizer_state_dict(pl_module, optimizer, options=OPTIONS))
    return {"groups": copied(groups), "moments": moments}


def _load_optimizer_state(pl_module: LightningModule, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    if saved["moments"] is None:
        optimizer.state.clear()
    else:
        set_optimizer_state_dict(pl_module, optimizer, saved["moments"])
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)  # torch's state dicts by name forget groups that hold no parameter
