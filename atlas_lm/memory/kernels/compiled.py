"""Code that is compiled once per machine, at first use, and called on all threads: the sources in `cpu/`.

PyTorch would run some hundreds of small operations a chunk of the memory. Where no compiler is found everything runs
through PyTorch, and the log says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_lm.memory.host_reads import simulated

log = logging.getLogger(__name__)

_sources = Path(__file__).with_name("cpp")
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

WIDE, LARGE, FLAG = "wide", "large", "flag"  # numbers of a tensor: of arithmetic, of large tensors, bool
_MAY_BE_EMPTY = {"B", "G", "rows", "before"}  # sizes that may be 0: batches, and the tail of a convolution of one tap


class Field(NamedTuple):
    """An address among the arguments of a compiled function, and what must lie there."""

    name: str
    shape: tuple[str, ...]  # names of sizes, or products of them such as "3*H*D"
    numbers: str = LARGE
    more: tuple[tuple[str, ...], ...] = ()  # an array of addresses: the shapes of the others
    used: str | None = None  # the size that says how many of the array are in use; None: all


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that autograd cannot look into: RuntimeError where a second derivative is asked for.

    With `create_graph` its result would be taken for a constant, and the second derivative lack most of its terms.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the memory has no second derivatives: call backward without create_graph")
        return backward(ctx, *grads)

    return checked


def plain(x: Tensor) -> Tensor:
    """As compiled code reads it: contiguous, and without PyTorch's mark that its sign is to be turned."""
    return x.resolve_neg().contiguous()


class Function:
    """A compiled function. Every address that it is given goes through the checks of `_point`."""

    def __init__(self, name: str, sizes: Sequence[str], numbers: Sequence[str], fields: Sequence[Field]) -> None:
        def pointers(field: Field) -> Any:
            return ctypes.c_void_p * (1 + len(field.more)) if field.more else ctypes.c_void_p

        class Arguments(ctypes.Structure):
            _fields_ = [
                *((size, ctypes.c_int64) for size in sizes),
                *((number, ctypes.c_double) for number in numbers),
                *((field.name, pointers(field)) for field in fields),
                ("rounding", ctypes.c_int64),
                ("next", ctypes.c_int64),
            ]

        self.name, self.sizes, self.fields, self._arguments = name, tuple(sizes), tuple(fields), Arguments
        terms = {term for field in fields for shape in (field.shape, *field.more) for term in shape}
        factors = {term: [part for part in term.split("*") if not part.isdigit()] for term in terms}
        self._named = sorted({name for parts in factors.values() for name in parts})
        constants = {term: math.prod(int(part) for part in term.split("*") if part.isdigit()) for term in terms}
        self._products = {term: (constants[term], factors[term]) for term in terms if factors[term] != [term]}
        self._shapes = functools.lru_cache(maxsize=4096)(self._find_shapes)  # decoding comes back to few of them

    def __call__(
        self,
        kind: tuple[torch.dtype, torch.dtype],
        sizes: dict[str, int],
        tensors: dict[str, Any],
        work: int,
        **numbers: float,
    ) -> None:
        """Run on all threads that PyTorch uses, each of which takes one piece of the work after another.

        `kind`: a key of KINDS. `sizes`: the arguments' sizes and those that only shapes name. `tensors`: by field, a
        list for an array; None stays null. They must outlive the call. `work`: operations in all.
        ValueError for a tensor that is not what the compiled code would take it for.
        """
        arguments = self._arguments(**{name: sizes[name] for name in self.sizes}, **numbers)
        self._point(arguments, kind, sizes, tensors)
        _run(f"{self.name}_{KINDS[kind]}", arguments, work)

    def _point(
        self, arguments: Any, kind: tuple[torch.dtype, torch.dtype], sizes: dict[str, int], tensors: dict[str, Any]
    ) -> None:
        dtypes = {WIDE: kind[0], LARGE: kind[1], FLAG: torch.bool}
        for field, shapes in zip(self.fields, self._shapes(tuple(sizes.items())), strict=True):
            given = tensors.get(field.name)
            if given is None:
                continue
            dtype = dtypes[field.numbers]
            if not field.more:
                setattr(arguments, field.name, self._address(field.name, given, shapes[0], dtype))
                continue
            if len(given) != len(shapes):
                raise ValueError(f"{self.name}: {field.name} must be {len(shapes)} tensors, got {len(given)}")
            array = getattr(arguments, field.name)
            for i, (tensor, shape) in enumerate(zip(given, shapes, strict=True)):
                if tensor is not None:
                    array[i] = self._address(field.name, tensor, shape, dtype)

    def _address(self, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Compiled code knows neither shapes nor dtypes: it would read and write past another tensor's end."""
        if x.shape != shape or x.dtype != dtype or not x.is_cpu or not x.is_contiguous() or x.is_neg():
            raise ValueError(
                f"{self.name}: {name} must be a contiguous CPU tensor {shape} of {dtype}, got {tuple(x.shape)} of "
                f"{x.dtype} on {x.device}, strides {x.stride()}; check the sizes of what the call was given"
            )
        address = x.data_ptr()
        if address == 0 and x.numel():
            raise ValueError(f"{self.name}: {name} is a {type(x).__name__} without memory of its own; give its values")
        return address

    def _find_shapes(self, sizes: tuple[tuple[str, int], ...]) -> list[list[tuple[int, ...]]]:
        known = dict(sizes)
        for name in self._named:
            if known[name] < 1 and name not in _MAY_BE_EMPTY:
                raise ValueError(f"{self.name}: a size must be at least 1, got {name}={known[name]}")
        for term, (number, names) in self._products.items():
            known[term] = math.prod([known[name] for name in names], start=number)
        found = []
        for field in self.fields:
            shapes = (field.shape, *field.more)
            count = known[field.used] if field.used else len(shapes)
            found.append([tuple([known[term] for term in shape]) for shape in shapes[:count]])
        return found


def leading_dimension(item: int, columns: int) -> int:
    """Of a matrix that compiled code works on in place: padded to whole vectors. `item`: bytes of a number."""
    built = library()
    assert built is not None
    return int(built.leading_dimension(ctypes.c_int64(columns), ctypes.c_int64(item)))


_ALONE = 2**18  # operations below which waking other threads costs more than it brings


def _run(name: str, arguments: Any, work: int) -> None:
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


@torch.compiler.disable  # it runs a compiler of its own, once
def library() -> ctypes.CDLL | None:
    """The compiled functions, built if this machine has not built them before; None where they cannot be."""
    return None if simulated() else _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
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
    sources = [path.read_text(encoding="utf-8") for path in sorted(_sources.iterdir()) if path.suffix in (".h", ".cpp")]
    key = "\n".join([*sources, version, *_FLAGS, _processor()])
    name = f"atlas_lm-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if (folder / name).exists():
        return folder / name
    log.info("compiling the memory's inner loops for this processor, once: about 15 seconds")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several ranks may build at once: the last rename wins
        built = Path(scratch) / name
        command = [compiler, *_FLAGS, str(_sources / "library.cpp"), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        built.replace(folder / name)
    return folder / name


def use_sources(files: dict[str, str]) -> None:
    """Compile these instead of the folder beside this file, which an exported model does not have."""
    global _sources
    key = hashlib.sha256("\n".join(part for item in sorted(files.items()) for part in item).encode()).hexdigest()
    folder = _cache_folder() / f"cpp-{key[:16]}"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            scratch = folder / f"{name}.{os.getpid()}"  # several processes may write it at once
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(folder / name)
    _sources = folder
    _library.cache_clear()


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
