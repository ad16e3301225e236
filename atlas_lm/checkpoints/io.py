"""Checkpoints that are either whole or absent, and clear words about those that cannot be used."""

import contextlib
import errno
import logging
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.direct_file import DirectFile
from atlas_lm.config.schema import nearest
from atlas_lm.data.run_tokenizer import another_tokenizer
from atlas_lm.runs.folder import checkpoints_in

log = logging.getLogger(__name__)

HALF = ".tmp"  # ending of what is being written
MODEL = ("hyper_parameters", "model")  # where Lightning puts `AtlasModule`'s argument


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to this model."""


class SaveError(OSError):
    """A checkpoint that could not be written; what was there before is unharmed."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: at every moment the old file or the new one is whole.

    Size and checksum of each are in the folder's manifest, see `manifest.py`: damage is found wherever it has happened.
    Reads with `weights_only=True` whatever the caller asks for: tensors and plain containers, no code.
    SaveError: the disk is full or not writable. CheckpointError: not a whole checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace `path` by `checkpoint`, durably. One process writes to a folder: what others left half is removed."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes to local files and takes no storage_options")
        target = Path(path)
        folder = target.parent
        temporary = target.with_name(f"{target.name}{HALF}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*.ckpt{HALF}"):
                left.unlink(missing_ok=True)
            with DirectFile(temporary) as file:
                with _without_crc():
                    torch.save(checkpoint, file)  # type: ignore[arg-type]  # write and flush are all that it needs
                checksum = file.finish()
            manifest.record(folder, target.name, temporary, checksum, position_in(checkpoint))
            os.replace(temporary, target)
            manifest.sync_folder(folder)
        except OSError as error:
            raise SaveError(_save_message(target, error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # saved it is, and the manifest is right without it
            manifest.settle(folder, target.name)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint's content, tensors on `map_location`."""
        return read_checkpoint(path, map_location)


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Half of the time that torch takes to save goes into sums that it never checks; the manifest's are better."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _save_message(target: Path, cause: OSError) -> str:
    other = newest_usable(target.parent)
    kept = f"; the previous checkpoint is whole, go on with resume={other}" if other else ""
    return f"cannot save {str(target)!r} ({cause.strerror or cause}): free space on that disk{kept}"


def read_checkpoint(path: str | Path, map_location: Any = "cpu", lazily: bool = False) -> dict[str, Any]:
    """Content of a checkpoint; `lazily` leaves the tensors on disk until they are used, and its bytes unverified.

    CheckpointError: missing, truncated, not the bytes that were written, not a checkpoint, or holding more than tensors
    and plain containers. It names the newest other checkpoint of the folder that can be used.
    """
    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise CheckpointError(f"no checkpoint {str(path)!r}{nearest(path.name, beside)}: correct the path")
    if not lazily:
        check_intact(path)
        if not manifest.versions(path.resolve()):
            _say_unknown(path)
    try:
        return _read(path, map_location, lazily)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {_remedy(path)}") from error


def check_intact(path: Path) -> None:
    """CheckpointError unless the bytes are those that were written, as far as that is known."""
    wrong = manifest.verify(path)
    if wrong:
        raise CheckpointError(f"{str(path)!r} is damaged, {wrong}: {_remedy(path)}")


@rank_zero_only
def _say_unknown(path: Path) -> None:
    log.warning("%s has no checksum in a %s beside it: damage would not be noticed", path, manifest.MANIFEST)


def why_unusable(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: its bytes are verified and its structure read, its tensors are not."""
    try:
        wrong = manifest.verify(path)
        if wrong:
            return f"{str(path)!r} is damaged, {wrong}"
        _read(path, "cpu", lazily=True)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def newest_usable(folder: Path, besides: Path | None = None) -> Path | None:
    """The latest checkpoint of a folder of those that can be used; never `besides` or a link to it."""
    for path in checkpoints_in(folder):
        if (besides is None or path.resolve() != besides.resolve()) and why_unusable(path) is None:
            return path
    return None


def _remedy(path: Path) -> str:
    other = newest_usable(path.parent, besides=path)
    return f"use {other}" if other else "copy it again or use another"


def position(path: Path) -> manifest.Position:
    """How far training had come when a checkpoint was written; of two of one run the later one has the greater one.

    The manifest knows it, or else the file itself. A file that nothing is known of counts as the latest, so that
    whoever takes an earlier one says why.
    """
    known = manifest.versions(path.resolve())
    if len(known) == 1 and "logged_steps" in known[0]:
        return manifest.position_of(known[0])
    try:
        return position_in(_read(path, "cpu", lazily=True))
    except (CheckpointError, OSError):
        return manifest.position_of(known[0]) if known else (math.inf, 0)


def position_in(checkpoint: dict[str, Any]) -> manifest.Position:
    """(logging steps, optimizer steps): the first never goes back, the second does at a rollback."""
    step = checkpoint.get("global_step")
    step = step if isinstance(step, int) else 0
    try:
        return steps_recorded(checkpoint), step
    except (KeyError, TypeError, AttributeError):  # of another program, or of weights alone
        return step, step


def steps_recorded(checkpoint: dict[str, Any]) -> int:
    """Number of the first logging step that a run resumed from `checkpoint` will write. KeyError: it is of no run."""
    loop = checkpoint["loops"]["fit_loop"]
    total = loop["epoch_loop.batch_progress"]["total"]
    # Lightning's own rule: where a step was not complete when it was saved, its number has not been counted up yet
    return loop["epoch_loop.state_dict"]["_batches_that_stepped"] + (total["completed"] < total["processed"])


def _read(path: Path, map_location: Any, lazily: bool) -> dict[str, Any]:
    """The content. CheckpointError, without a remedy, if it is none of ours."""
    broken = f"{str(path)!r} is truncated or not a checkpoint ({path.stat().st_size} bytes)"
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=lazily or None)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            what = "holds Python objects, not only tensors and plain containers"
            raise CheckpointError(f"{str(path)!r} {what}, and is not atlas-lm's") from error
        raise CheckpointError(broken) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to before the start of a file that is cut off
            raise
        raise CheckpointError(broken) from error
    except MemoryError:
        raise
    except Exception as error:  # what a few changed bytes make torch's reader raise has no end
        raise CheckpointError(broken) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{str(path)!r} is a file of tensors but not a checkpoint of a run")
    odd = [str(name) for name, value in content["state_dict"].items() if not _is_plain(value)]
    if odd:
        raise CheckpointError(f"{str(path)!r} holds no plain tensor as {odd[0]}, and is not atlas-lm's")
    arguments = content.get(MODEL[0], {})
    if not isinstance(arguments, dict) or not isinstance(arguments.get(MODEL[1], {}), dict):
        raise CheckpointError(f"{str(path)!r} does not say which model it is of, and is not atlas-lm's")
    return content


def _is_plain(value: Any) -> bool:
    """A tensor with numbers in it: torch also reads sparse, quantised and nested ones, and some without data."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_nested and not value.is_meta


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
    """CheckpointError naming the fields in which the checkpoint's model, or the kind of its optimizer, differs from
    `module`'s."""
    saved, wanted = read_checkpoint(path, lazily=True).get(MODEL[0], {}), module.hparams
    found = differences(dict(saved.get(MODEL[1], {})), dict(wanted.get(MODEL[1], {})))
    if saved.get("vocab_size") != wanted.get("vocab_size"):
        found.append(f"a vocabulary of {wanted.get('vocab_size')} but {saved.get('vocab_size')} in the checkpoint")
    tokenizer = another_tokenizer(saved, wanted, path)
    if tokenizer:
        found.append(tokenizer)
    before, now = (dict(settings.get("optim", {})).get("name") for settings in (saved, wanted))
    if before != now:  # its moments mean nothing to another one
        found.append(f"optim.name={now} but {before} in the checkpoint")
    if found:
        raise CheckpointError(
            f"{str(path)!r} is of another model or optimizer: {'; '.join(found)}: "
            "set these back to resume, or use init_from= to start a new run from its weights"
        )


def load_weights(module: LightningModule, path: Path) -> None:
    """Copy a checkpoint's weights into `module`. CheckpointError if names, shapes or the tokenizer differ."""
    content = read_checkpoint(path)
    tokenizer = another_tokenizer(content.get(MODEL[0], {}), module.hparams, path)
    if tokenizer:
        raise CheckpointError(f"{str(path)!r} does not fit, {tokenizer}: set the tokenizer (or the shards) back")
    _fill(module, content, path)


def build_module(content: dict[str, Any], path: Path, **optim: Any) -> Any:
    """The `AtlasModule` of a checkpoint's content, weights included; `optim`: settings to change of its optimizer.

    CheckpointError: the content describes no model that this version can build, or has not its weights.
    """
    from atlas_lm.training.module import AtlasModule

    try:
        arguments = dict(content[MODEL[0]])
        module = AtlasModule(**{**arguments, "optim": {**arguments["optim"], **optim}})
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is of no model that this version of atlas-lm can build ({type(error).__name__}: {error}): "
            "choose another checkpoint"
        ) from error
    _fill(module, content, path)
    return module


def _fill(module: LightningModule, content: dict[str, Any], path: Path) -> None:
    saved, wanted = content["state_dict"], module.state_dict()
    wrong = [name for name in wanted if name not in saved or saved[name].shape != wanted[name].shape]
    wrong += [name for name in saved if name not in wanted]
    if wrong:
        found = differences(
            dict(content.get(MODEL[0], {}).get(MODEL[1], {})), dict(module.hparams.get(MODEL[1], {}))
        ) or [f"{len(wrong)} tensors differ, the first is {wrong[0]}"]
        raise CheckpointError(f"{str(path)!r} is of another model: {'; '.join(found)}: set these back")
    module.load_state_dict(saved)
