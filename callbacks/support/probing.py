"""What probes share: a held-out batch, a corner in which training is not disturbed, and values that get logged.

A probe must leave training bitwise as it was: no gradient, no random number, no mode of a module may differ after it.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from callbacks.support.lightning_internals import logging_step

log = logging.getLogger(__name__)


@contextmanager
def undisturbed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """eval(), no gradients, the trainer's precision; random generators and every module's mode as before at the end."""
    modes = {module: module.training for module in pl_module.modules()}
    device = trainer.strategy.root_device
    pl_module.eval()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.no_grad(),
            trainer.precision_plugin.val_step_context(),
        ):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        reshard(pl_module)


def reshard(pl_module: LightningModule) -> None:
    """Drop what FSDP has gathered: without a backward pass it keeps the root's, blind to changes of the shards."""
    for module in pl_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@runtime_checkable
class HasMemoryLayers(Protocol):
    """A module that says which of its blocks hold a memory; one that does not has its layers counted from 0."""

    def memory_layers(self) -> Sequence[int]: ...


def layer_numbers(pl_module: LightningModule, count: int) -> list[int]:
    """Which blocks the `count` layers of a measurement are. ValueError: the module names another number of them."""
    if not isinstance(pl_module, HasMemoryLayers):
        return list(range(count))
    found = list(pl_module.memory_layers())
    if len(found) != count:
        raise ValueError(
            f"memory_layers() of {type(pl_module).__name__} names {len(found)} blocks, {found}, and {count} were "
            "measured: name each block with a memory once"
        )
    return found


def held_out_batch(trainer: Trainer, rows: int | None, asker: str, fewer: bool = False) -> Any:
    """The first `rows` rows of this rank's validation data as one batch, on its device; the same at every call.

    None: the first validation batch as it is. Where there are fewer rows, or batches that cannot be joined because
    their tensors differ in more than the number of rows, those that there are, with a warning unless `fewer` will do.
    ValueError, naming who asks, if the Trainer has no validation data.
    """
    loaders = trainer.val_dataloaders
    if loaders is None:
        raise ValueError(
            f"{asker} measures on held-out data and this run validates on none: give the Trainer a validation "
            f"loader and limit_val_batches > 0, or remove {asker}"
        )
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    with torch.random.fork_rng([]):  # an iterator draws a seed for its workers
        batches = iter(loader)
        batch = next(batches)
        while rows is not None and 0 < rows_of(batch) < rows:
            joined = _joined(batch, next(batches, None))
            if joined is None:
                break
            batch = joined
    if rows is not None:
        if 0 < rows_of(batch) < rows and trainer.is_global_zero and not fewer:
            log.warning(
                "%s: rows=%d held-out rows are asked for, the validation loader gives %d: it measures on these",
                asker, rows, rows_of(batch),
            )  # fmt: skip
        batch = tree_map(lambda x: x[:rows] if isinstance(x, Tensor) and x.dim() else x, batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def rows_of(batch: Any) -> int:
    """Of a batch's first tensor that has any; 0 where none has."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _joined(batch: Any, following: Any) -> Any:
    """Both as one batch; None where there is no following one, or it is of another form."""
    leaves, spec = tree_flatten(batch)
    others, other_spec = tree_flatten(following)
    alike = spec == other_spec and all(
        isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() > 0 and x.shape[1:] == y.shape[1:]
        for x, y in zip(leaves, others, strict=True)
    )
    return tree_unflatten([torch.cat(pair) for pair in zip(leaves, others, strict=True)], spec) if alike else None


def record(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log `values` at this very step, also between the steps at which Lightning logs; callbacks and bars see them too.

    Not through `LightningModule.log`: what that is given in `on_train_start` is an average over the epoch, and comes
    back at its end in place of newer values.
    """
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in values.items()})
    send(trainer, values)


def log_number(pl_module: LightningModule, name: str, value: float) -> None:
    """`pl_module.log`, of a tensor that stays on the host: Lightning would send a number to the device, and wait."""
    pl_module.log(name, torch.tensor(float(value)))


def begins(trainer: Trainer) -> bool:
    """Whether this run has seen no batch yet, not even before it was resumed or rolled back."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready == 0


def record_start(trainer: Trainer, values: Mapping[str, float]) -> None:
    """`record` what was found before the first step of a run.

    A resumed run's records hold its step already; there only what nobody has restored becomes visible to callbacks.
    """
    if begins(trainer):
        record(trainer, values)
        return
    metrics = trainer.callback_metrics
    metrics.update({name: torch.tensor(float(value)) for name, value in values.items() if name not in metrics})


def send(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give `values` to the loggers at this very step."""
    step = logging_step(trainer)  # it never goes back
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in values.items()}, step=step)
