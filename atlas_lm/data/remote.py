"""Token shards at an address that fsspec reads (s3://, gs://, https://, …): copied to this machine, each file once.

A sequence is read from any place of a shard, so the shards are memory-mapped here and not read over the network. A copy
lies in a folder named after its index: where the shards at the address change, another copy is made.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from filelock import FileLock, Timeout
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from atlas_lm.files import write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 3
FULL = errno.ENOSPC, errno.EDQUOT
ELSEWHERE = "free space, or name another folder with data.source.cache"
PATIENCE = 5.0  # seconds of waiting for another process before it is said
WAIT = 2.0  # seconds before the second attempt, twice as long before the next


def is_remote(path: str) -> bool:
    """Whether it begins with a protocol."""
    return "://" in path


def default_cache() -> Path:
    """~/.cache/atlas-lm/tokens, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atlas-lm" / "tokens"


class RemoteShards:
    """Shards at `address`, and the folder of their copy below `cache`. `remedy`: for a copy that is damaged.

    Where the address does not answer, the newest copy of it is taken, with a warning. ValueError: there is none.
    """

    def __init__(self, address: str, cache: Path) -> None:
        self.address = address.rstrip("/")
        self.remedy = f"delete the folder, it is copied again from {self.address}"
        known = cache / f"{blake2b(self.address.encode(), digest_size=16).hexdigest()}.folder"  # of the newest copy
        try:
            index = self._read("index.json")
        except ValueError as error:  # a job that is started again is not to end where the address does not answer
            folder = cache / known.read_text() if known.is_file() else None
            if folder is None or not (folder / "index.json").is_file():
                raise
            self.folder = folder
            log.warning("warning: %s; taking the copy of before, %s", error, folder)
            return
        self.folder = cache / blake2b(index, digest_size=16).hexdigest()
        self._write(self.folder / "index.json", index)
        self._write(known, self.folder.name)

    def fetch_small(self, name: str) -> None:
        """A file that no checksum is known of."""
        if not (self.folder / name).is_file():
            self._write(self.folder / name, self._read(name))

    def fetch(self, entries: list[Any]) -> None:
        """All files that are not there yet. Several processes may ask at once: one fetches, the others wait.

        ValueError, also for a copy that differs from what the index says: nothing of it is kept.
        """
        for entry in entries:
            if not re.fullmatch(r"\w[\w.-]*", entry["file"]):  # somebody else's index must not write where it likes
                raise ValueError(f"the index at {self.address} names the file {entry['file']!r}: not a plain name")
        missing = [entry for entry in entries if not (self.folder / entry["file"]).is_file()]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            missing = [entry for entry in missing if not (self.folder / entry["file"]).is_file()]
            if not missing:
                return
            size = sum(entry["size"] for entry in missing)
            log.info("fetching %d files, %.1f MB, from %s to %s", len(missing), size / 1e6, self.address, self.folder)
            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
            with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
                task = progress.add_task("fetching", total=size)
                for entry in missing:
                    self._fetch(entry)
                    progress.advance(task, entry["size"])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the copy against other processes, and say so where another one has it."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            log.info("another process copies %s to %s: waiting for it", self.address, self.folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _fetch(self, entry: Any) -> None:
        def copy(target: BinaryIO) -> None:
            digest, size = blake2b(digest_size=16), 0
            with fsspec.open(f"{self.address}/{entry['file']}", "rb") as source:
                while block := source.read(1 << 22):
                    digest.update(block)
                    size += len(block)
                    target.write(block)
            if (size, digest.hexdigest()) != (entry["size"], entry["blake2b"]):
                raise OSError(f"{size} bytes came that are not the {entry['size']} of the index")

        self._tried(entry["file"], lambda: write_atomically(self.folder / entry["file"], copy, own=True))

    def _read(self, name: str) -> bytes:
        def read() -> bytes:
            with fsspec.open(f"{self.address}/{name}", "rb") as file:
                return bytes(file.read())

        return self._tried(name, read)

    def _tried(self, name: str, act: Callable[[], T]) -> T:
        """What `act` gives; again after a while where it fails. ValueError: it failed each time."""
        for attempt in range(ATTEMPTS):
            try:
                return act()
            except ImportError as error:
                raise ValueError(f"{self.address} needs a package: {error}") from error
            except ValueError as error:  # fsspec's for a protocol that it does not know
                raise ValueError(f"{self.address} cannot be read: {error}") from error
            except Exception as error:  # each protocol's package has errors of its own
                if isinstance(error, OSError) and error.errno in FULL:
                    raise ValueError(f"{str(self.folder)!r} cannot hold {name} ({error}): {ELSEWHERE}") from error
                # over HTTP a server that does not answer counts as a file that is not there
                why = _line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
                if attempt + 1 == ATTEMPTS:
                    absent = isinstance(error, FileNotFoundError)
                    raise ValueError(
                        f"{self.address}/{name} cannot be copied ({why}): "
                        + ("correct the address: the folder that prepare wrote" if absent else "try again")
                    ) from error
                wait = WAIT * 2**attempt
                log.warning("%s/%s: %s; again in %.0f s", self.address, name, why, wait)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _write(self, path: Path, content: str | bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content, own=True)
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be written ({error}): {ELSEWHERE}") from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
