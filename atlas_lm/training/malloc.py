"""Keep freed memory in the process: otherwise a training step returns the same pages, and faults them in, each time."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc refuses more
_TOP_PAD = 256 * 2**20  # bytes fetched at once
_NEVER = 2**31 - 1


def configure_malloc() -> bool:
    """Raise glibc's thresholds; False where the C library is another one. Changes no result, only the time."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    options = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD))
    return all(libc.mallopt(option, value) == 1 for option, value in options)
