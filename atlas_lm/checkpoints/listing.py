"""The checkpoints of a folder in the order in which they were trained, and which of them can be used."""

import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.content import CheckpointError, position_in, read_content

log = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the latest first, each once: under its link's name if it has one.

    Ordered by how far training had come, whatever clocks and names say: time stamps do not survive a copy, clocks are
    set back. Left out: what a rollback abandoned, and links to nowhere.
    """
    found: dict[Path, Path] = {}
    for path in sorted(folder.glob("*.ckpt"), key=Path.is_symlink):
        if path.is_file() and not re.search(r"\.abandoned\d*$", path.resolve().name):
            found[path.resolve()] = path
    by_name = sorted(found.values(), key=lambda path: path.name)  # those of one position hold the same
    return sorted(by_name, key=position, reverse=True)


def position(path: Path) -> manifest.Position:
    """How far training had come when a checkpoint was written; of two of one run the later one has the greater one.

    The manifest knows it, or else the file itself. A file that nothing is known of counts as the latest, so that
    whoever takes an earlier one says why.
    """
    known = manifest.versions(path.resolve())
    if len(known) == 1 and "logged_steps" in known[0]:
        return manifest.position_of(known[0])
    try:
        return position_in(read_content(path, "cpu", lazily=True))
    except (CheckpointError, OSError):
        return manifest.position_of(known[0]) if known else (math.inf, 0)


class Usable(NamedTuple):
    """A checkpoint whose bytes were verified. `header`: its content, the tensors left on disk."""

    path: Path
    header: dict[str, Any]


def examine(path: Path) -> Usable:
    """Verify a checkpoint's bytes and read its header, each once. CheckpointError, OSError: it cannot be used."""
    file = path.resolve()  # what is damaged is the file, not the link
    wrong = manifest.verify(file)
    if wrong:
        raise CheckpointError(f"{str(file)!r} is damaged, {wrong}")
    return Usable(path, read_content(file, "cpu", lazily=True))


def why_unusable(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        examine(path)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def newest_usable(folder: Path, besides: Path | None = None) -> Path | None:
    """The latest checkpoint of a folder of those that can be used; never `besides` or a link to it."""
    for path in checkpoints_in(folder):
        if (besides is None or path.resolve() != besides.resolve()) and why_unusable(path) is None:
            return path
    return None


def newest_checkpoint(run: Path) -> Path | None:
    """The latest checkpoint of a run, intact or not; `last.ckpt` rather than the file it points to."""
    return next(iter(checkpoints_in(run / "checkpoints")), None)


def newest_examined(run: Path) -> tuple[Usable | None, list[str]]:
    """The latest checkpoint of those that can be used, and one line for each later one that cannot."""
    skipped: list[str] = []
    for path in checkpoints_in(run / "checkpoints"):
        try:
            return examine(path), skipped
        except (CheckpointError, OSError) as error:
            skipped.append(str(error))
    return None, skipped


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """As `newest_examined`, the file alone."""
    found, skipped = newest_examined(run)
    return found.path if found else None, skipped


def intact_checkpoint(run: Path) -> Usable:
    """The newest intact checkpoint of a run; the log names newer ones that are damaged. ValueError if there is none."""
    found, skipped = newest_examined(run)
    if found is None:
        if skipped:
            raise ValueError(f"run {str(run)!r} has no intact checkpoint: {'; '.join(skipped)}: choose another run")
        raise ValueError(f"run {str(run)!r} has no checkpoint: it ended before its first one, choose another run")
    for line in skipped:
        log.warning("%s: taking %s instead", line, found.path)
    return found
