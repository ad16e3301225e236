"""Checkpoints that are either whole or absent, and clear words about those that cannot be used."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from atlas_lm.config import nearest

MODEL = ("hyper_parameters", "model")  # where Lightning puts `AtlasModule`'s argument


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to this model."""


class SaveError(OSError):
    """A checkpoint that could not be written; what was there before is unharmed."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: at every moment the old file or the new one is whole.

    Reads with `weights_only=True` whatever the caller asks for: tensors and plain containers, no code.
    SaveError: the disk is full or not writable. CheckpointError: not a whole checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace `path` by `checkpoint`, durably."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes to local files and takes no storage_options")
        target = Path(path)
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch's writer turns some OSErrors into RuntimeErrors
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise SaveError(_save_message(target, cause)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint's content, tensors on `map_location`."""
        return read_checkpoint(path, map_location)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_message(target: Path, cause: OSError) -> str:
    others = sorted(target.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime) if target.parent.is_dir() else []
    others = [path for path in others if path.is_file()]
    kept = f"; the previous checkpoint is whole, go on with resume={others[-1]}" if others else ""
    return f"cannot save {str(target)!r} ({cause.strerror or cause}): free space on that disk{kept}"


def read_checkpoint(path: str | Path, map_location: Any = "cpu", lazily: bool = False) -> dict[str, Any]:
    """Content of a checkpoint; `lazily` leaves the tensors on disk until they are used.

    CheckpointError: missing, truncated, not a checkpoint, or holding more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise CheckpointError(f"no checkpoint {str(path)!r}{nearest(path.name, beside)}: correct the path")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=lazily or None)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            what = "holds Python objects, not only tensors and plain containers"
            raise CheckpointError(f"{str(path)!r} {what}: it is not atlas-lm's") from error
        raise CheckpointError(_broken(path)) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to before the start of a file that is cut off
            raise
        raise CheckpointError(_broken(path)) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(_broken(path)) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{str(path)!r} is a file of tensors but not a checkpoint of a run: choose another")
    return content


def _broken(path: Path) -> str:
    others = sorted(p for p in path.parent.glob("*.ckpt") if p.is_file() and p.resolve() != path.resolve())
    remedy = f"use {others[-1]}" if others else "copy it again or use another"
    return f"{str(path)!r} is truncated or not a checkpoint ({path.stat().st_size} bytes): {remedy}"


def differences(saved: dict[str, Any], wanted: dict[str, Any], without: tuple[str, ...] = ()) -> list[str]:
    """`name=<wanted> but <saved> in the checkpoint` for every field that differs; `name` and `without` do not count."""
    names = [name for name in [*wanted, *(n for n in saved if n not in wanted)] if name not in ("name", *without)]
    absent = "absent"
    return [
        f"model.{name}={wanted.get(name, absent)} but {saved.get(name, absent)} in the checkpoint"
        for name in names
        if wanted.get(name, absent) != saved.get(name, absent)
    ]


def check_same_model(path: Path, module: LightningModule) -> None:
    """CheckpointError naming the fields in which the checkpoint's model differs from `module`'s."""
    saved, wanted = read_checkpoint(path, lazily=True).get(MODEL[0], {}), module.hparams
    found = differences(dict(saved.get(MODEL[1], {})), dict(wanted.get(MODEL[1], {})))
    if saved.get("vocab_size") != wanted.get("vocab_size"):
        found.append(f"a vocabulary of {wanted.get('vocab_size')} but {saved.get('vocab_size')} in the checkpoint")
    if found:
        raise CheckpointError(
            f"{str(path)!r} is of another model: {'; '.join(found)}: "
            "set these back to resume, or use init_from= to start a new run from its weights"
        )


def load_weights(module: LightningModule, path: Path) -> None:
    """Copy a checkpoint's weights into `module`. CheckpointError if their names or shapes differ."""
    content = read_checkpoint(path)
    saved, wanted = content["state_dict"], module.state_dict()
    wrong = [name for name in wanted if name not in saved or saved[name].shape != wanted[name].shape]
    wrong += [name for name in saved if name not in wanted]
    if wrong:
        found = differences(
            dict(content.get(MODEL[0], {}).get(MODEL[1], {})), dict(module.hparams.get(MODEL[1], {}))
        ) or [f"{len(wrong)} tensors differ, the first is {wrong[0]}"]
        raise CheckpointError(f"{str(path)!r} is of another model: {'; '.join(found)}: set these back")
    module.load_state_dict(saved)
