"""Compiled code against PyTorch's operations: outputs and every gradient; and where nothing can be built."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.features import Sketch
from atlas_lm.memory.hierarchy import Hierarchy
from atlas_lm.memory.kernels import attention as cpu_attention
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.kernels import features as cpu_features
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.model.attention import SlidingWindowAttention
from atlas_lm.model.block import memory_heads
from atlas_lm.model.convolution import CausalConv
from atlas_lm.model.norm import RMSNorm, normalised_heads
from tests.support import ROOT
from tests.support.hierarchy_cases import make_hierarchy, make_inputs
from tests.support.memory_cases import relative_errors
from tests.support.pairwise import every_pair

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.01}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def results(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    total = sum((y * w).double().sum() for y, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(total, leaves)]


def compare(function, leaves: list[Tensor], module, dtype: torch.dtype, monkeypatch) -> None:
    assert compiled.library() is not None
    fast = results(function(), leaves)
    monkeypatch.setattr(module, "can_run", lambda *_: False)
    slow = results(function(), leaves)
    errors = relative_errors([x.double() for x in slow], [x.double() for x in fast])
    assert max(errors) <= TOLERANCE[dtype]
    assert [x.dtype for x in slow] == [x.dtype for x in fast]


@DTYPES
@pytest.mark.parametrize("T", [1, 2, 5, 300, 515])
@pytest.mark.parametrize("width", [0, 1, 4])
def test_convolution_heads_and_norms(T, width, dtype, monkeypatch):
    torch.manual_seed(0)
    conv = CausalConv(96, width).to(wide(dtype)) if width else None
    x = torch.randn(3, T, 96).to(dtype).requires_grad_()
    tail = torch.randn(3, max(0, width - 1), 96).to(dtype).requires_grad_()
    leaves = [x] + ([] if conv is None else [conv.weight]) + ([tail] if width > 1 else [])
    compare(lambda: memory_heads(x, tail, conv, 2), leaves, cpu_convolution, dtype, monkeypatch)


@DTYPES
@pytest.mark.parametrize("T", [1, 2, 5, 300, 515])
@pytest.mark.parametrize(("width", "channels"), [(1, 96), (4, 96), (4, 83)])
def test_convolution_alone(T, width, channels, dtype, monkeypatch):
    torch.manual_seed(0)
    conv = CausalConv(channels, width).to(wide(dtype))
    x = torch.randn(3, T, channels).to(dtype).requires_grad_()
    tail = torch.randn(3, width - 1, channels).to(dtype).requires_grad_()
    leaves = [x, conv.weight] + ([tail] if width > 1 else [])
    compare(lambda: conv(x, tail)[:1], leaves, cpu_convolution, dtype, monkeypatch)


def test_a_vector_of_zeros_has_no_direction():
    x = torch.zeros(1, 5, 96, requires_grad=True)
    q, k, v = memory_heads(x, torch.zeros(1, 3, 96), CausalConv(96, 4), 2)
    (gradient,) = torch.autograd.grad(q.sum() + k.sum() + v.sum(), x)
    assert q.abs().max() == k.abs().max() == 0
    assert gradient.isfinite().all()


@DTYPES
@pytest.mark.parametrize(
    ("T", "window"),
    [(1, 64), (5, 3), (63, 64), (64, 64), (200, 64), (300, 100), (70, 200), (330, 330), (200, 1000), (130, 1)],
)
def test_window_attention(T, window, dtype, monkeypatch):
    torch.manual_seed(0)
    attention = SlidingWindowAttention(32, 2, 16, window, 10_000.0).to(wide(dtype))
    x = torch.randn(2, T, 32, dtype=wide(dtype), requires_grad=True)

    def run() -> tuple[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return (attention(x, None)[0],)

    compare(run, [x, attention.qkv.weight], cpu_attention, dtype, monkeypatch)


@DTYPES
def test_sketch(dtype, monkeypatch):
    torch.manual_seed(0)
    sketch = Sketch(16, 15).to(wide(dtype))
    x = torch.randn(2, 3, 700, 16).to(dtype).requires_grad_()

    def run() -> tuple[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return (sketch(x),)

    compare(run, [x, *sketch.parameters()], cpu_features, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norm(dtype):
    torch.manual_seed(0)
    fast, slow = (norm(48).to(dtype) for norm in (RMSNorm, nn.RMSNorm))
    for norm in (fast, slow):
        norm.weight.data.copy_(torch.linspace(0.5, 2, 48))
    heads, row = (torch.randn(*shape, 48, dtype=dtype, requires_grad=True) for shape in ((2, 3, 700), (2, 300)))
    assert compiled.library() is not None
    pairs = [
        (results((normalised_heads(fast, heads),), [heads, fast.weight]),
         results((slow(heads).transpose(1, 2).flatten(2),), [heads, slow.weight])),
        (results((fast(row),), [row, fast.weight]), results((slow(row),), [row, slow.weight])),
    ]  # fmt: skip
    for found, expected in pairs:
        assert max(relative_errors(expected, found)) <= TOLERANCE[dtype]


@every_pair(chunk=[1, 8, 16, 64, 256], network=["gated_mlp", "mlp", "linear"], restarts=[(), (3, 70)])
def test_bfloat16_loop_is_as_exact_as_pytorchs(chunk, network, restarts, monkeypatch):
    """Its errors against float32, beside those of PyTorch's operations in bfloat16."""
    T, heads, head_dim = 300, 2, 16
    torch.manual_seed(0)
    hierarchy = Hierarchy(MemorySpec(32, heads, head_dim, (chunk,), 256, 256, rank=31, hidden=16, network=network))
    q, k = (nnf.normalize(torch.randn(2, heads, T, head_dim), dim=-1).requires_grad_() for _ in range(2))
    x, v = torch.randn(2, T, 32, requires_grad=True), torch.randn(2, heads, T, head_dim, requires_grad=True)
    restart = None
    if restarts:
        restart = torch.zeros(2, T, dtype=torch.bool)
        restart[:, list(restarts)] = True

    def evaluate(low: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y, _ = hierarchy(x, q, k, v, restart_BT=restart)
        return results((y.float(),), [x, q, k, v, *hierarchy.parameters()])

    truth, fast = evaluate(False), evaluate(True)
    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    slow = evaluate(True)
    ours, theirs = relative_errors(truth, fast), relative_errors(truth, slow)
    # their mean: the largest is a gate's bias, a sum over all tokens that nearly cancels, and differs from draw to draw
    assert sum(ours) / len(ours) <= max(0.005, 1.1 * sum(theirs) / len(theirs))
    assert 1e-4 < max(ours) <= 0.05  # it was bfloat16


def test_threads_do_not_change_a_bit(monkeypatch):
    """Nor do denormals, which are flushed in every thread or in none."""
    monkeypatch.setattr(compiled, "_ALONE", 0)
    hierarchy, inputs = make_hierarchy(), make_inputs(100)
    leaves = [*(x.requires_grad_() for x in inputs), *hierarchy.parameters()]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, _ = hierarchy(*inputs)
            found.append([y, *torch.autograd.grad(y.sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nan_is_passed_on():
    hierarchy, inputs = make_hierarchy(), make_inputs(100)
    inputs.v[0, 0, 40, 1] = torch.nan
    y, _ = hierarchy(*inputs)
    assert y[0, 0, 41:].isnan().any()
    assert y[1].isfinite().all()


SCRIPT = """
import logging, torch
logging.basicConfig(level="INFO")
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.hierarchy import Hierarchy
h = Hierarchy(MemorySpec(16, 2, 8, (4,), 8, 8, rank=7, hidden=8))
q = torch.randn(1, 2, 20, 8)
y, _ = h(torch.randn(1, 20, 16), q, q, q)
y.sum().backward()
print("built" if compiled.library() else "not built", bool(y.isfinite().all()))
"""


def run_script(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )


@pytest.mark.long
def test_without_a_compiler_it_runs_and_says_so(tmp_path):
    done = run_script(CXX="/nonexistent/g++", XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["not", "built", "True"], done.stderr
    assert done.stderr.count("runs through PyTorch alone") == 1
    assert "install g++ 9 or newer" in done.stderr


@pytest.mark.long
def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.cpp:1: error: no luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run_script(CXX=str(broken), XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["not", "built", "True"], done.stderr
    assert "x.cpp:1: error: no luck" in done.stderr


@pytest.mark.slow
def test_ranks_build_at_the_same_time(tmp_path):
    """The last rename wins; nobody loads half a file; the next start builds nothing."""
    command = [sys.executable, "-c", SCRIPT]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert output.split() == ["built", "True"], errors
    assert len(list((tmp_path / "atlas_lm").iterdir())) == 1
    assert "compiling" not in run_script(XDG_CACHE_HOME=str(tmp_path)).stderr


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with caplog.at_level(logging.INFO):
        folder = compiled._cache_folder()
    assert folder.is_dir()
    assert blocked not in folder.parents
