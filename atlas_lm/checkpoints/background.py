"""Checkpoints that are written while training continues: it waits for a copy in memory alone."""

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from atlas_lm.checkpoints.io import AtomicCheckpointIO

log = logging.getLogger(__name__)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Copies what it is given and returns; a thread writes it as `AtomicCheckpointIO` does, one file after the other.

    Two copies may wait: the checkpoint and the snapshot of one step. A third save waits for the first of them. An error
    of the disk is raised by `wait` and the next save, and `failed` knows of it. Holds up to two copies of a checkpoint
    in host memory from then on, pinned where there is a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: list[Future[None]] = []
        self._copies = [_Copy(), _Copy()]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Returns when the content is copied. SaveError, from a save before this one: it could not be written."""
        save = super().save_checkpoint
        self.hand_over(checkpoint, lambda content: save(content, path, storage_options))

    def hand_over(self, content: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Returns when the content is copied; the thread calls `write`. SaveError as of `save_checkpoint`."""
        if self.failed():
            self.wait()
        copy_ = self._copies.pop(0)
        self._copies.append(copy_)
        if copy_.writing is not None:
            copy_.writing.exception()
            if self.failed():
                self.wait()
        copy_.writing = self._thread.submit(write, copy_.copied(content))
        left = [future for future in self._pending if not future.done() or future.exception() is not None]
        self._pending = [*left, copy_.writing]

    def after_writing(self, action: Callable[[], None]) -> None:
        """Call `action` from the thread when all that was saved before is on the disk; never if it could not be."""
        before = list(self._pending)

        def act() -> None:
            if all(future.exception() is None for future in before):
                action()

        self._pending.append(self._thread.submit(act))

    def failed(self) -> bool:
        """Whether a write has failed and its error was not raised yet; does not wait."""
        return any(future.done() and future.exception() is not None for future in self._pending)

    def wait(self) -> None:
        """Until all is on the disk and every action is done. SaveError: it is not."""
        errors = [error for future in self._pending if (error := future.exception()) is not None]
        self._pending = []  # only now: an interrupted wait must forget nothing
        if errors:
            raise errors[0]

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint's content, also of one that is being written."""
        self.wait()
        return super().load_checkpoint(path, map_location, weights_only)

    def teardown(self) -> None:
        """Finish what is being written. Its error is logged: the run has ended, perhaps by another."""
        try:
            self.wait()
        except OSError as error:
            log.error("%s", error)
        self._copies = [_Copy(), _Copy()]


class _Copy:
    """Memory that checkpoints are copied into, again and again."""

    def __init__(self) -> None:
        self.writing: Future[None] | None = None  # who reads it
        self._rooms: list[Tensor] = []
        self._parts: list[Any] = []  # DTensors

    def copied(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The content on the host, sharing no memory with what training changes. Shared storages stay shared."""
        leaves = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if not isinstance(leaf, DTensor)]
        sharded = [leaf for leaf in leaves if isinstance(leaf, DTensor)]
        storages = {x.untyped_storage().data_ptr(): x for x in tensors if x.untyped_storage().nbytes()}
        sizes = [x.untyped_storage().nbytes() for x in storages.values()]
        if [room.nbytes for room in self._rooms] != sizes:  # fresh memory costs more than the copy
            self._rooms = []
            pinned = torch.cuda.is_available()
            self._rooms = [torch.empty(n, dtype=torch.uint8, device="cpu", pin_memory=pinned) for n in sizes]
        rooms = dict(zip(storages, self._rooms, strict=True))
        for x in storages.values():
            rooms[x.untyped_storage().data_ptr()].copy_(_bytes(x), non_blocking=True)
        if any(x.is_cuda for x in tensors):
            torch.cuda.synchronize()
        known = {id(x): _in(rooms.get(x.untyped_storage().data_ptr()), x) for x in tensors}
        known |= {id(x): part for x, part in zip(sharded, self._parts_of(sharded), strict=True)}
        return copy.deepcopy(checkpoint, known)

    def _parts_of(self, sharded: list[Any]) -> list[Any]:
        """This rank's parts, on the host."""
        if [_kind(x) for x in self._parts] != [_kind(x) for x in sharded]:
            self._parts = [x.detach().to("cpu", copy=True) for x in sharded]
            return self._parts
        for part, x in zip(self._parts, sharded, strict=True):
            part.to_local().copy_(x.detach().to_local(), non_blocking=True)
        if any(x.device.type == "cuda" for x in sharded):
            torch.cuda.synchronize()
        return self._parts


def _kind(x: Any) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.placements, x.to_local().shape


def _bytes(x: Tensor) -> Tensor:
    """The whole storage of a tensor; (bytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _in(room: Tensor | None, x: Tensor) -> Tensor:
    """`x` as it lies in the copy of its storage; an empty tensor has none."""
    place = torch.empty(0, dtype=x.dtype, device="cpu")
    if room is None:
        return place.reshape(x.shape)
    return place.set_(room.untyped_storage(), x.storage_offset(), x.shape, x.stride())
