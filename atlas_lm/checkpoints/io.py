"""Checkpoints that are either whole or absent, and clear words about those that cannot be used."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.content import CheckpointError, position_in, read_content
from atlas_lm.checkpoints.direct_file import DirectFile
from atlas_lm.checkpoints.listing import Usable, newest_usable
from atlas_lm.config.names import nearest
from atlas_lm.files import replace

log = logging.getLogger(__name__)

HALF = ".tmp"  # ending of what is being written


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
            manifest.record(
                folder, target.name, temporary, checksum, position_in(checkpoint), checkpoint.get(manifest.SHARDS)
            )
            replace(temporary, target)
        except OSError as error:
            raise SaveError(_save_message(target, error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # saved it is, and the manifest is right without it
            manifest.settle(folder, target.name)
            remove_lost_shards(folder)  # of what it has replaced

    def hand_over(self, content: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Call `write` with the content, or with a copy of it at some later time."""
        write(content)

    def remove_checkpoint(self, path: Any) -> None:
        """The file, and then the shards that nothing else says it has."""
        target = Path(path)
        sharded = any(manifest.SHARDS in entry for entry in manifest.versions(target))
        super().remove_checkpoint(path)
        if sharded:
            remove_lost_shards(target.parent)

    verified: Path | None = None
    """A file whose bytes this process has just verified, to resume from it: they are read once, not verified again."""

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint's content, tensors on `map_location`."""
        known, self.verified = self.verified, None
        return read_checkpoint(path, map_location, verify=known is None or Path(path).resolve() != known.resolve())


def remove_lost_shards(folder: Path, keep: str = "") -> None:
    """Remove the shards of a folder that none of its checkpoints has, abandoned ones included, and is not `keep`.

    Where it is not known what a checkpoint has, nothing is removed.
    """
    from atlas_lm.checkpoints import shards

    if not any(folder.glob(f"*{shards.ENDING}")):
        return
    wanted = {keep}
    known = {name: entry for name, entry in manifest.read(folder).items() if (folder / name).is_file()}
    for entry in known.values():
        versions = (entry, *entry.get("previous", []))
        wanted |= {part[manifest.SHARDS]["folder"] for part in versions if manifest.SHARDS in part}
    for path in folder.glob("*.ckpt*"):
        if path.name in known or path.is_symlink() or not path.is_file():
            continue
        try:
            wanted.add(shards.folder_in(path) or "")
        except Exception as error:  # what a few changed bytes make torch's reader raise has no end
            log.warning("%s cannot be read (%s): no shards are removed in %s", path, error, folder)
            return
    shards.remove_orphans(folder, wanted)


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
    kept = f"; the previous checkpoint is whole, resume with resume={other}" if other else ""
    return f"cannot save {str(target)!r} ({cause.strerror or cause}): free space on that disk{kept}"


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", lazily: bool = False, verify: bool = True
) -> dict[str, Any]:
    """Content of a checkpoint; `lazily` leaves the tensors on disk until they are used, and its bytes unverified.

    CheckpointError: missing, truncated, not the bytes that were written, not a checkpoint, or holding more than tensors
    and plain containers. It names the newest other checkpoint of the folder that can be used.
    """
    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise CheckpointError(f"no checkpoint {str(path)!r}{nearest(path.name, beside)}: correct the path")
    if verify and not lazily:
        check_intact(path)
        if not manifest.versions(path.resolve()):
            _say_unknown(path)
    try:
        return read_content(path, map_location, lazily)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {_remedy(path)}") from error


def read_header(path: Path) -> Usable:
    """A checkpoint's header, its bytes verified. CheckpointError as of `read_checkpoint`."""
    check_intact(path)
    return Usable(path, read_checkpoint(path, lazily=True))


def check_intact(path: Path) -> None:
    """CheckpointError unless the bytes are those that were written, as far as that is known."""
    wrong = manifest.verify(path)
    if wrong:
        raise CheckpointError(f"{str(path)!r} is damaged, {wrong}: {_remedy(path)}")


@rank_zero_only
def _say_unknown(path: Path) -> None:
    log.warning("%s has no checksum in a %s beside it: damage would not be noticed", path, manifest.MANIFEST)


def _remedy(path: Path) -> str:
    other = newest_usable(path.parent, besides=path)
    return f"use {other}" if other else "copy it again or use another"
