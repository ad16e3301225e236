"""Parameters and optimizer state sharded over all ranks (FSDP2)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from atlas_lm.checkpoints import manifest, shards
from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.content import CheckpointError
from atlas_lm.checkpoints.io import AtomicCheckpointIO, SaveError, read_checkpoint, remove_lost_shards

PARTS = StateDictOptions(full_state_dict=False, cpu_offload=False)
WHOLE = StateDictOptions(full_state_dict=True)


class FullySharded(ModelParallelStrategy):
    """ModelParallelStrategy over all ranks of all machines; its own `auto` means one data-parallel rank per machine.

    With `save_distributed_checkpoint` each rank writes its part of a checkpoint (`checkpoints/shards.py`), in the
    background where the plugin for checkpoints does so. Such a checkpoint is resumed on any number of ranks, also by
    strategies that keep a whole copy on each; and a checkpoint of theirs is resumed here.
    """

    _own_group: Any = None  # of gloo: training's collectives and those of a thread must not meet

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part of the weights, not copied; whole ones on rank 0 where checkpoints are not sharded."""
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model, options=PARTS)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part of the moments by name of the parameter, not copied; or as Lightning has them."""
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        plain = _plain(optimizer)
        fresh = not plain.state
        found = get_optimizer_state_dict(self.model, plain, options=PARTS)
        if fresh:  # torch makes moments to have some to give, and counts a step that there was not
            plain.state.clear()
            found["state"] = {}
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """On all ranks. SaveError on all of them, perhaps later (see the plugin): one could not write its part."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        plugin = self.checkpoint_io
        if storage_options is not None or not isinstance(plugin, AtomicCheckpointIO):
            raise TypeError("sharded checkpoints are written by AtomicCheckpointIO, without storage_options")
        path = Path(self.broadcast(filepath))
        folder = path.parent / self.broadcast(shards.fresh_name(path))
        group, rank = self._group(), self.global_rank

        def write(content: dict[str, Any]) -> None:
            """Each part of it on all ranks, or none: who fails tells the others before they wait for it."""
            header, tensors = shards.header_of(content)
            files: dict[str, Any] = {}

            def prepare() -> None:
                if rank == 0:
                    remove_lost_shards(path.parent, keep=folder.name)
                folder.mkdir(parents=True, exist_ok=True)

            def finish() -> None:
                if rank == 0:
                    header[shards.SHARDS] = {"folder": folder.name, "files": files}
                    AtomicCheckpointIO().save_checkpoint(header, path)

            try:
                _on_all_ranks(prepare, group)
                for part in _on_all_ranks(lambda: shards.write(tensors, folder, rank, group), group):
                    files |= part
                _on_all_ranks(finish, group)
            except OSError as error:
                if rank == 0:
                    shutil.rmtree(folder, ignore_errors=True)
                raise SaveError(f"cannot save {str(path)!r} ({error}): free space on that disk") from error

        plugin.hand_over(checkpoint, write)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizers of all ranks, whichever strategy wrote the file; the rest of its content.

        CheckpointError: it cannot be read, or is of another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        plugin = self.checkpoint_io
        if isinstance(plugin, BackgroundCheckpointIO):
            plugin.wait()
        verified = isinstance(plugin, AtomicCheckpointIO) and plugin.verified == path
        if isinstance(plugin, AtomicCheckpointIO):
            plugin.verified = None  # once: later the bytes may be others
        content: dict[str, Any] = {}

        def read() -> None:
            wrong = manifest.verify(path) if self.is_global_zero and not verified else None
            if wrong:
                raise CheckpointError(f"{str(path)!r} is damaged, {wrong}: use an older one")
            content.update(read_checkpoint(path, lazily=True))

        try:  # a rank that cannot read it must not leave the others waiting for it below
            _on_all_ranks(read, self._group())
        except OSError as error:
            raise CheckpointError(f"{error}") from error
        if shards.SHARDS in content:
            self._load_shards(content, path)
        elif content.get("sharded", True):  # one file that rank 0 wrote for all; older checkpoints do not say
            return super().load_checkpoint(path, weights_only)
        else:
            self._load_whole(content)
        return {**content, "state_dict": {}}

    def _load_shards(self, header: dict[str, Any], path: Path) -> None:
        assert self.model is not None
        folder, group = path.resolve().parent / Path(header[shards.SHARDS]["folder"]).name, self._group()
        weights = get_model_state_dict(self.model, options=PARTS)
        states = [
            get_optimizer_state_dict(self.model, _plain(optimizer), options=PARTS) for optimizer in self.optimizers
        ]
        try:
            shards.load_into({"state_dict": weights}, folder, group)
            there = shards.names(folder)
            saved = [any(name.startswith(f"optimizer_{i}.") for name in there) for i in range(len(states))]
            for i, state in enumerate(states):
                if saved[i]:
                    shards.load_into({f"optimizer_{i}": {"state": state["state"]}}, folder, group)
        except shards.ShardsError as error:
            raise CheckpointError(f"{str(path)!r}: {error}: use an older checkpoint") from error
        set_model_state_dict(self.model, weights, options=PARTS)
        for optimizer, state, has_moments in zip(self.optimizers, states, saved, strict=True):
            if has_moments:
                set_optimizer_state_dict(self.model, _plain(optimizer), state, options=PARTS)
            else:  # it had made no step
                _plain(optimizer).state.clear()

    def _load_whole(self, content: dict[str, Any]) -> None:
        """Each rank takes its part of a file that all of them read."""
        assert self.model is not None
        set_model_state_dict(self.model, content["state_dict"], options=WHOLE)
        for optimizer, saved in zip(self.optimizers, content["optimizer_states"], strict=True):
            plain = _plain(optimizer)
            groups: Any = get_optimizer_state_dict(self.model, plain, options=PARTS)["param_groups"]
            names = [name for group in groups for name in group["params"]]
            state: Any = {
                "state": {names[number]: moments for number, moments in saved["state"].items()},
                "param_groups": [
                    {**old, "params": group["params"]} for old, group in zip(saved["param_groups"], groups, strict=True)
                ],
            }
            set_optimizer_state_dict(self.model, plain, state, options=WHOLE)

    def _group(self) -> Any:
        if self._own_group is None:
            self._own_group = torch.distributed.new_group(backend="gloo")
        return self._own_group


def _plain(optimizer: Any) -> Optimizer:
    """Without Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _on_all_ranks(act: Callable[[], Any], group: Any) -> list[Any]:
    """What `act` returns, by rank. OSError on all of them: one rank's has failed."""
    try:
        mine, error = act(), None
    except Exception as caught:
        mine, error = None, f"{caught}" or type(caught).__name__
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, (mine, error), group=group)
    errors = sorted({said for _, said in found if said is not None})
    if errors:
        raise OSError("; ".join(errors))
    return [value for value, _ in found]
