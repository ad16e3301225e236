"""Tensors of a checkpoint that every rank writes its own part of, with torch's distributed checkpoint.

step-0000200.ckpt                    what is no tensor of the model or the optimizer; written last, so it means that all
                                     is there
step-0000200.3f9a41c2.shards/        `.metadata` and one file a rank; read on any number of ranks, or by one process
"""

from __future__ import annotations

import pickle
import secrets
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.utils._pytree import tree_map

from atlas_lm.checkpoints.manifest import SHARDS
from atlas_lm.files import sha256, sync_folder

ENDING = ".shards"
# what a few changed bytes make torch and pickle raise has no end; torch's own is no Exception
FAILURES = (Exception, dcp.api.CheckpointException)
INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}  # fmt: skip
"""What torch's index of shards is pickled of, of tensors: anything else torch would unpickle freely."""


class ShardsError(ValueError):
    """Shards that are missing or not what was written."""


def fresh_name(checkpoint: Path) -> str:
    """Of a folder for a checkpoint's shards; a checkpoint that is written again gets another one."""
    return f"{checkpoint.name.removesuffix('.ckpt')}.{secrets.token_hex(4)}{ENDING}"


def write(tensors: dict[str, Any], folder: Path, rank: int, group: Any = None) -> dict[str, dict[str, Any]]:
    """Write this rank's part of nested tensors into a folder that is there, on all ranks; size and SHA-256 of the files
    that it wrote, by name.

    OSError on all ranks: one of them could not write. On this one: its files cannot be read again.
    """
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    except dcp.api.CheckpointException as error:
        causes = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        raise OSError(causes) from error
    names = [path.name for path in folder.glob(f"__{rank}_*")] + [".metadata"] * (rank == 0)
    sync_folder(folder)
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def load_into(tensors: dict[str, Any], folder: Path, group: Any = None) -> None:
    """Fill nested tensors with what was written under their names, whole or sharded in any way.

    On all ranks of `group`; None: in this process alone. ShardsError: a name is missing, or the files are damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=PlainReader(folder), process_group=group, no_dist=group is None)
    except FAILURES as error:
        raise ShardsError(f"the shards in {str(folder)!r} cannot be read ({_first_line(error)})") from error


def read(folder: Path) -> dict[str, Any]:
    """All tensors as they were nested, whole, in this process's memory. ShardsError as of `load_into`."""
    metadata = _index(folder)
    entries: dict[str, Any] = metadata.state_dict_metadata
    flat = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_into(flat, folder)
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        place: Any = nested
        *path, last = metadata.planner_data[name]
        for part in path:
            place = place.setdefault(part, {})
        place[last] = tensor
    return nested


class PlainReader(dcp.FileSystemReader):
    """torch's reader, whose index is a pickle: here it may name torch's own classes of the index alone."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index. pickle.UnpicklingError: it would run code."""
        with (Path(str(self.path)) / ".metadata").open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is no index of shards")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def whole(header: dict[str, Any], folder: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content as one that is not sharded has it: whole weights, moments numbered by parameter group.

    ShardsError as of `read`, or header and shards do not belong together.
    """
    try:
        tensors = tree_map(lambda x: x.to(map_location), read(folder / Path(header[SHARDS]["folder"]).name))
        states = [
            _numbered(optimizer["param_groups"], tensors.get(f"optimizer_{i}", {}).get("state", {}))
            for i, optimizer in enumerate(header["optimizer_states"])
        ]
        content = {**header, "sharded": False, "state_dict": tensors["state_dict"], "optimizer_states": states}
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardsError(f"its shards are not those that it names ({error}), and it is not atlas-lm's") from error
    del content[SHARDS]
    return content


def _numbered(groups: list[dict[str, Any]], moments: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with numbers in place of its parameters' names, in the order of the groups."""
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: values for name, values in moments.items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def header_of(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what one file holds, nested tensors for the shards) of a checkpoint."""
    optimizers = content.get("optimizer_states", [])
    header = {
        **content, "state_dict": {},
        "optimizer_states": [{"state": {}, "param_groups": optimizer["param_groups"]} for optimizer in optimizers],
    }  # fmt: skip
    tensors: dict[str, Any] = {"state_dict": content["state_dict"]}
    tensors |= {f"optimizer_{i}": {"state": optimizer["state"]} for i, optimizer in enumerate(optimizers)}
    return header, tensors


def remove_orphans(folder: Path, wanted: Collection[str]) -> None:
    """Remove what saves left that were killed: shards of a folder whose names are not in `wanted`."""
    for path in folder.glob(f"*{ENDING}"):
        if path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)


def folder_in(checkpoint: Path) -> str | None:
    """The name of the folder that a checkpoint says it has; None: it is not sharded. OSError, and whatever
    else torch's reader raises: it cannot be read."""
    header = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    shards = header.get(SHARDS) if isinstance(header, dict) else None
    return Path(shards["folder"]).name if shards else None


def names(folder: Path) -> set[str]:
    """Of the tensors in a folder, nested ones with dots between. ShardsError as of `read`."""
    return set(_index(folder).state_dict_metadata)


def _index(folder: Path) -> Metadata:
    try:
        return PlainReader(folder).read_metadata()
    except FAILURES as error:
        raise ShardsError(f"the shards in {str(folder)!r} cannot be read ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
