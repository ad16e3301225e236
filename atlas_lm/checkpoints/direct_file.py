"""A file written past the page cache while its SHA-256 is taken: how a checkpoint gets to the disk.

Through the cache every byte needs a page of memory that nobody reads again, which costs time where pages are dear, as
on virtual machines, and drives out the data that training does read. Filesystems that know no other way get the same
bytes through the cache.
"""

import contextlib
import fcntl
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch

CHUNK = 2 * 2**20  # bytes that are written at once; two are in use, one filled while the other is written
BLOCK = 4096  # bytes; direct writes begin in memory and on disk at multiples, and are multiples
DIRECT = getattr(os, "O_DIRECT", 0)  # 0: this system has none

_spare: list[memoryview] = []  # chunks that no file uses now: fresh memory is slower than the disk


class DirectFile:
    """Create or empty `path` and write to it, from the first byte to the last; a context manager.

    An error of the disk is raised by `finish`, what is written after it is dropped: who writes may be in the middle of
    something. OSError: `path` cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._chunks = [_chunk(), _chunk()]
        self._handle = _open(path)
        self._size = 0
        self._sum = hashlib.sha256()
        self._error: OSError | None = None
        self._pending: list[Future[None]] = []  # with the chunk that is not being filled
        self._filled = 0  # bytes of the other one
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        """Any object with the buffer protocol; its number of bytes."""
        left = memoryview(data).cast("B")
        count = len(left)
        while left:
            part = left[: CHUNK - self._filled]
            self._chunks[0][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            left = left[len(part) :]
            if self._filled == CHUNK:
                self._send()
        return count

    def flush(self) -> None:
        """Nothing: torch asks for it, `finish` does it."""

    def finish(self) -> str:
        """Everything is on the disk; the SHA-256 of what was written, in hexadecimal. OSError: it is not."""
        self._send()
        self._wait()
        if self._error is not None:
            raise self._error
        os.ftruncate(self._handle, self._size)
        os.fsync(self._handle)
        return self._sum.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()
        self._hasher.shutdown()
        _spare.extend(self._chunks)
        os.close(self._handle)

    def _send(self) -> None:
        """Hand the filled chunk on, and take the other one, as soon as it is free."""
        self._wait()
        if self._error is None:
            full, count = self._chunks[0], self._filled
            self._pending = [
                self._writer.submit(self._put, full, count),
                self._hasher.submit(self._sum.update, full[:count]),
            ]
            self._size += count
        self._filled = 0
        self._chunks.reverse()

    def _wait(self) -> None:
        for future in self._pending:
            try:
                future.result()
            except OSError as error:
                self._error = error
        self._pending = []

    def _put(self, chunk: memoryview, count: int) -> None:
        left = chunk[: -(-count // BLOCK) * BLOCK]  # only the last one is not full; `finish` cuts off what is too much
        while left:
            try:
                left = left[os.write(self._handle, left) :]
            except OSError:  # it wants other blocks, or has cut a write short; what else is wrong will be so again
                if not _is_direct(self._handle):
                    raise
                _go_through_the_cache(self._handle)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with contextlib.suppress(OSError):  # what else is wrong will be so again
        return os.open(path, flags | DIRECT, 0o666)
    return os.open(path, flags, 0o666)


def _is_direct(handle: int) -> bool:
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & DIRECT)


def _go_through_the_cache(handle: int) -> None:
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~DIRECT)


def _chunk() -> memoryview:
    """`CHUNK` bytes of memory that begin at a multiple of `BLOCK`."""
    with contextlib.suppress(IndexError):
        return _spare.pop()
    room = torch.empty(CHUNK + BLOCK, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % BLOCK
    return room[start : start + CHUNK].numpy().data
