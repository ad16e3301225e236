"""Code that is compiled once per machine, at first use, and called on all threads: the sources in `cpu/`.

PyTorch would run some hundreds of small operations a chunk of the memory. Where no compiler is found everything runs
through PyTorch, and the log says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("cpu")
_FLAGS = [
    "-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
    "-shared",
]  # fmt: skip
# precision of arithmetic and of large tensors → the suffix of a function
KINDS = {
    (torch.float64, torch.float64): "double",
    (torch.float32, torch.float32): "float",
    (torch.float32, torch.bfloat16): "bf16",
}

Field = str | tuple[str, int]  # a tensor, or so many of them


def structure(sizes: Sequence[str], numbers: Sequence[str], tensors: Sequence[Field]) -> type[ctypes.Structure]:
    """The arguments of a compiled function: integers, floats, pointers, and what `call` fills in."""

    class Arguments(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_int64) for name in sizes),
            *((name, ctypes.c_double) for name in numbers),
            *((f, ctypes.c_void_p) if isinstance(f, str) else (f[0], ctypes.c_void_p * f[1]) for f in tensors),
            ("rounding", ctypes.c_int64),
            ("next", ctypes.c_int64),
        ]

    return Arguments


def point(arguments: Any, fields: Sequence[Field], tensors: dict[str, Any]) -> None:
    """Set the pointers to tensors, which must be contiguous and outlive the call; None stays null."""
    for field in fields:
        name, many = (field, False) if isinstance(field, str) else (field[0], True)
        given = tensors.get(name)
        if given is None:
            continue
        if many:
            for i, tensor in enumerate(given):
                getattr(arguments, name)[i] = tensor.data_ptr()
        else:
            setattr(arguments, name, given.data_ptr())


def leading_dimension(item: int, columns: int) -> int:
    """Of a matrix that compiled code works on in place: padded to whole vectors. `item`: bytes of a number."""
    built = library()
    assert built is not None
    return int(built.leading_dimension(ctypes.c_int64(columns), ctypes.c_int64(item)))


_ALONE = 2**18  # operations below which waking another thread costs more than it brings


def call(name: str, arguments: Any, pieces: int, work: int) -> None:
    """Run on as many threads as PyTorch uses: each takes one of the `pieces` after another. `work`: operations."""
    built = library()
    assert built is not None
    arguments.rounding = built.rounding_mode()
    function, pointer = getattr(built, name), ctypes.byref(arguments)
    others = min(torch.get_num_threads(), pieces) - 1 if work > _ALONE else 0
    futures = [_helpers(torch.get_num_threads()).submit(function, pointer) for _ in range(others)]
    function(pointer)
    for future in futures:
        future.result()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, built if this machine has not built them before; None where they cannot be."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    try:
        if compiler is None:
            raise OSError("no C++ compiler found")
        built = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "warning: the memory runs through PyTorch alone, several times slower: %s; "
            "install g++ 9 or newer, or name a compiler by CXX", _first_line(error),
        )  # fmt: skip
        return None
    built.rounding_mode.restype = built.leading_dimension.restype = ctypes.c_int64
    return built


def _first_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [repr(error)]
    return lines[0].strip()


def _build(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    key = "\n".join([*sources, version, *_FLAGS, _processor()])
    name = f"atlas_lm-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if (folder / name).exists():
        return folder / name
    log.info("compiling the memory's inner loops for this processor, once: about 15 seconds")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several ranks may build at once: the last rename wins
        built = Path(scratch) / name
        command = [compiler, *_FLAGS, str(_SOURCES / "library.cpp"), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        built.replace(folder / name)
    return folder / name


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            kept = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        return "".join(sorted(kept))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(root) / "atlas_lm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:  # a read-only home
        return Path(tempfile.mkdtemp(prefix="atlas_lm-"))


@functools.cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="atlas_lm")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not survive a fork
