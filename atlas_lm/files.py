"""Files that are whole or absent, and durable: what the rooms share to write, link, sync and hash them."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[1]  # of the repository: train.py, conf, docs


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object], own: bool = False) -> None:
    """Write a file so that no reader, no crash and no power cut meets half of it; text in UTF-8.

    `content` may be a function that writes to the file that it is given. `own`: other processes may write the same
    file at this moment, so what this one has not finished gets a name of its own. OSError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if own else f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """Give a whole file its name. A reader sees the old file or the new one, also after a power cut."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def link_atomically(link: Path, target: Path) -> None:
    """Let a relative symbolic link point at `target`. A reader sees the old target or the new one."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    os.replace(temporary, link)


def next_free(path: Path) -> Path:
    """<stem>.<n><suffix> beside `path`, with the first n from 1 on that nothing has yet."""
    n = 1
    while (free := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists():
        n += 1
    return free


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file's bytes, read in pieces; hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
