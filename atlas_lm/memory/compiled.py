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
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("cpu")
# Elsewhere the compiler knows no preferred width.
_WIDTH = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
_FLAGS = [
    "-std=c++17", "-O3", "-march=native", *_WIDTH, "-fno-math-errno", "-fno-trapping-math", "-fPIC",
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


_ALONE = 2**18  # operations below which waking other threads costs more than it brings


def call(name: str, arguments: Any, work: int) -> None:
    """Run on all threads that PyTorch uses, each of which takes one piece of the work after another.

    `work`: operations in all.
    """
    built = library()
    assert built is not None
    arguments.rounding = built.rounding_mode()
    function, pointer, threads = getattr(built, name), ctypes.byref(arguments), torch.get_num_threads()
    parallel = _parallel()
    if parallel is None or threads == 1 or work < _ALONE:
        function(pointer)
    else:  # as many as PyTorch's own loops have: the runtime ends and starts threads where the number changes
        parallel(ctypes.cast(function, ctypes.c_void_p), pointer, ctypes.c_uint(threads), ctypes.c_uint(0))


@functools.cache
def _parallel() -> Any:
    """GOMP_parallel of the OpenMP runtime that PyTorch runs on; None where it is another runtime.

    Threads of our own would share the cores with PyTorch's, which spin for a while after each loop.
    """
    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    for path in (path for folder in folders for path in sorted(folder.glob("libgomp*"))):
        try:
            return ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
    log.warning("warning: no OpenMP runtime found beside PyTorch: the memory's inner loops run on one thread")
    return None


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
