"""The loop over chunks on a CPU, as compiled code: `cpu_loop.cpp` is built once per machine, at first use.

PyTorch would run some hundreds of small operations a chunk; here a core takes one (batch, head) after another and keeps
its fast weights in the cache. What it computes is `loop.py`'s, to rounding. Where no compiler is found the loop runs
through PyTorch, and the log says so.
"""

# G batch × heads, K chunks, C chunk, N = C + halo tokens of a block, F feature dim, P pre-activations, E hidden dim,
# D outputs; of layer l: R rows (F or E), Q columns (P or D)

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory import network as net
from atlas_lm.memory.chunk_step import Inputs, Plan

log = logging.getLogger(__name__)

STATES = 64  # fast weights that are kept for the backward pass, at most; those between are computed again

_SOURCE = Path(__file__).with_name("cpu_loop.cpp")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
_ENTRIES = {
    (torch.float64, torch.float64): "loop_double",
    (torch.float32, torch.float32): "loop_float",
    (torch.float32, torch.bfloat16): "loop_bf16",
}

_SIZES = ("G", "K", "C", "N", "F", "P", "E", "D", "kind", "token", "complete", "stride", "context", "train")
_POINTERS = (
    "initial_out", "phi", "v", "by_initial", "phi_q", "q_by_initial", "scores", "gamma", "same", "old", "decay", "on",
    "at", "over", ("before", 2), "y", ("after", 2), ("kept", 2), "pre", "read_pre", "error", "back", "total", "scale",
    "dy", ("dstate", 2), "dinitial", "dphi", "dv", "dby_initial", "dphi_q", "dq_by_initial", "dscores", "ddecay", "don",
    "dat", "dover",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        ("radius", ctypes.c_double),
        ("smallest", ctypes.c_double),
        *(
            (name, ctypes.c_void_p) if isinstance(name, str) else (name[0], ctypes.c_void_p * name[1])
            for name in _POINTERS
        ),
        ("rounding", ctypes.c_int64),
        ("next", ctypes.c_int64),
    ]


def can_run(plan: Plan, inputs: Inputs) -> bool:
    """Whether the compiled loop knows this rule, device and precision, and could be built here."""
    if inputs.phi.device.type != "cpu" or plan.update != "gradient":
        return False
    return (inputs.decay.dtype, plan.operands) in _ENTRIES and library() is not None


def run(plan: Plan, states: list[Tensor], inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """As `loop.run`."""
    y, *after = _CompiledLoop.apply(plan, len(states), *states, *inputs)
    return y, after


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loop, built if this machine has not built it before; None where it cannot be."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    try:
        if compiler is None:
            raise OSError("no C++ compiler found")
        return _load(_build(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "warning: the memory runs through PyTorch alone, several times slower: %s; "
            "install g++ 9 or newer, or name a compiler by CXX", _last_line(error),
        )  # fmt: skip
        return None


def _last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [repr(error)]
    return lines[0].strip()


def _load(path: Path) -> ctypes.CDLL:
    built = ctypes.CDLL(str(path))
    for entry in _ENTRIES.values():
        getattr(built, entry).argtypes = [ctypes.POINTER(_Arguments)]
        getattr(built, entry).restype = None
    built.rounding_mode.restype = ctypes.c_int64
    return built


def _build(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = "\n".join([_SOURCE.read_text(encoding="utf-8"), version, *_FLAGS, _processor()])
    name = f"cpu_loop-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if (folder / name).exists():
        return folder / name
    log.info("compiling the memory's loop for this processor, once: about 10 seconds")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several ranks may build at once: the last rename wins
        built = Path(scratch) / name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
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

_ALONE = 2**18  # multiply-adds below which waking another thread costs more than it brings


def _call(plan: Plan, arguments: _Arguments, entry: str) -> None:
    """Run on all threads that PyTorch would use; each takes one (batch, head) after another."""
    built = library()
    assert built is not None
    arguments.rounding = built.rounding_mode()
    f, pointer = getattr(built, entry), ctypes.byref(arguments)
    work = arguments.G * arguments.K * arguments.N * (arguments.F * arguments.P + arguments.E * arguments.D)
    others = min(torch.get_num_threads(), arguments.G) - 1 if work > _ALONE else 0
    futures = [_helpers(torch.get_num_threads()).submit(f, pointer) for _ in range(others)]
    f(pointer)
    for future in futures:
        future.result()


class _CompiledLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, layers: int, *tensors: Tensor | None) -> Any:
        tensors = tuple(None if x is None else x.contiguous() for x in tensors)
        x = Inputs(*tensors[layers:])
        arguments, entry = _arguments(plan, x), _ENTRIES[x.decay.dtype, plan.operands]
        before = tensors[:layers]
        after = [torch.empty_like(z) for z in before if z is not None]
        G, K, C, N = arguments.G, arguments.K, arguments.C, arguments.N
        y = x.phi.new_empty(G, K * C, arguments.D)
        outputs: dict[str, Any] = {"y": y, "before": before, "after": after}
        if plan.train:
            wide, P, E, D = x.decay.new_empty, arguments.P, arguments.E, arguments.D
            outputs |= {"kept": [wide(-(-K // arguments.stride), *z.shape) for z in after]}
            outputs |= {"pre": wide(G, K, N, P), "total": wide(G, K, C if arguments.token else 1, N)}
            outputs |= {"scale": wide(G, K, 3)}
            if arguments.kind:
                outputs |= {"read_pre": wide(G, K, C, P), "error": wide(G, K, N, D), "back": wide(G, K, N, E)}
        _point(arguments, x._asdict() | outputs)
        _call(plan, arguments, entry)
        if plan.train:
            ctx.plan, ctx.layers = plan, layers
            ctx.records = {name: outputs.get(name) for name in ("kept", "pre", "total", "scale", "read_pre", "error", "back")}
            ctx.save_for_backward(*tensors[layers:])
        return (y, *after)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dafter: Tensor) -> Any:
        if torch.is_grad_enabled():  # the records are constants: second derivatives would lack most of their terms
            raise RuntimeError("the memory has no second derivatives: call backward without create_graph")
        if ctx.records is None:
            raise RuntimeError("the memory's graph is gone after its first backward pass; call the model again")
        records, ctx.records = ctx.records, None
        x = Inputs(*ctx.saved_tensors)
        arguments, entry = _arguments(ctx.plan, x), _ENTRIES[x.decay.dtype, ctx.plan.operands]
        dstate = [dz.clone(memory_format=torch.contiguous_format) for dz in dafter]
        grads: dict[str, Tensor | None] = {}
        partial = ctx.plan.complete < arguments.K  # the last chunk may learn nothing
        for name in ("phi", "v", "by_initial", "phi_q", "q_by_initial", "scores", "at", "over", "decay", "on"):
            like = getattr(x, name)
            empty = torch.zeros_like if partial or name in ("decay", "on") else torch.empty_like
            grads[name] = None if like is None else empty(like)
        grads["initial_out"] = None if x.initial_out is None else torch.empty_like(x.initial_out)
        outputs = {f"d{name}": grad for name, grad in grads.items()} | {"dinitial": grads["initial_out"]}
        dy = dy.to(ctx.plan.operands).contiguous()
        _point(arguments, x._asdict() | records | outputs | {"dy": dy, "dstate": dstate})
        _call(ctx.plan, arguments, entry)
        return (None, None, *dstate, *(grads.get(name) for name in Inputs._fields))


def _arguments(plan: Plan, x: Inputs) -> _Arguments:
    G, K, N, F = x.phi.shape
    D, P = x.v.size(-1), x.by_initial.size(-1)
    E = 0 if x.initial_out is None else x.initial_out.size(1)
    act = plan.network.activation
    return _Arguments(
        G=G, K=K, C=x.phi_q.size(2), N=N, F=F, P=P, E=E, D=D, kind=0 if act is None else act.width,
        token=x.at is not None, complete=plan.complete, stride=-(-K // STATES), context=plan.context,
        train=plan.train, radius=plan.radius, smallest=net.SMALLEST_CURVATURE,
    )  # fmt: skip


def _point(arguments: _Arguments, tensors: dict[str, Any]) -> None:
    for name in _POINTERS:
        field = name if isinstance(name, str) else name[0]
        given = tensors.get(field)
        if given is None:
            continue
        if isinstance(name, str):
            setattr(arguments, field, given.data_ptr())
        else:
            for i, tensor in enumerate(given):
                getattr(arguments, field)[i] = tensor.data_ptr()
