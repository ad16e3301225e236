"""One memory layer, forward and backward, beside its peers: python -m benchmarks.memory_layer [--peers] [--json FILE]

Every case is a process of its own: all layers of one chunk size, length and precision, interleaved, medians. Peak
memory comes from further processes, one a layer, in which it does one step. A layer takes (batch, length, dim) and
gives the same back: projections, short convolution and norms are part of it.

Useful operations of the memory, per token and head, in multiply-adds, with F features, P pre-activations, E hidden
units, D outputs and a chunk of C tokens (N = C + context − 1):

    forward   with W_init (keys, queries)            2 F P
              with the fast weights (keys, query)    2 F P
              the update of w and of s               2 F P
              second layer (e, its way back, read, update of both)   5 E D
              curvature: φφᵀ, hhᵀ                    N (F + E)
    backward  twice all of that, but not the curvature's
    Newton–Schulz adds 2 (2 M² L + M³) a step and matrix of M × L, M ≤ L, per chunk of C tokens

and those of the projections, 4 dim² forward and 8 backward. Their share of what the same time would have been enough
for, at this machine's rate for a 2048³ product in that precision, is the `matmul_share`. What an implementation
computes again or pads is not counted. Titans' share is not given: its operations are others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.allocator import keep_freed_memory
from atlas_lm.attention import SlidingWindowAttention
from atlas_lm.block import MemoryBranch
from atlas_lm.memory.hierarchy import MemorySpec

DIM, HEADS, HEAD_DIM, HIDDEN, RANK, BATCH = 256, 4, 64, 64, 63, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One row of conditions."""

    chunk: int
    length: int
    dtype: str
    rule: str
    device: str
    compiled: bool


class MemoryLayer(nn.Module):
    """Our memory branch with one unsharded memory, read at its chunk's start, and an output projection."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        spec = MemorySpec(
            DIM, HEADS, HEAD_DIM, (), case.chunk, -(-case.length // case.chunk) * case.chunk,
            rank=RANK, hidden=HIDDEN, update=case.rule,
        )  # fmt: skip
        self.branch = MemoryBranch(spec, conv=4)
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, _, _ = self.branch(x, self.branch.initial_conv(x.size(0)), None, None)
        return self.out(y)


class Attention(nn.Module):
    """Softmax attention by SDPA over everything before."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Window(nn.Module):
    """Our sliding-window attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SlidingWindowAttention(DIM, HEADS, HEAD_DIM, 64, 10_000.0)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, self.attention.initial_state(x.size(0)))[0])


def titans(case: Case) -> nn.Module:
    """titans-pytorch with the papers' semantics: `batch_size` = chunk, so that its weights move at every chunk."""
    try:
        from titans_pytorch import MemoryMLP, NeuralMemory
    except ImportError:
        sys.exit('--peers needs titans-pytorch: pip install -e ".[peers]"')
    model = MemoryMLP(dim=HEAD_DIM, depth=2, expansion_factor=HIDDEN / HEAD_DIM)
    memory = NeuralMemory(
        dim=DIM, heads=HEADS, dim_head=HEAD_DIM, chunk_size=case.chunk, batch_size=case.chunk, model=model,
        spectral_norm_surprises=case.rule == "newton_schulz",
    )  # fmt: skip

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = memory

        def forward(self, x: Tensor) -> Tensor:
            return self.memory(x)[0]

    return Layer()


def build(name: str, case: Case) -> nn.Module:
    makers: dict[str, Callable[[], nn.Module]] = {
        "atlas-lm": lambda: MemoryLayer(case),
        "attention": Attention,
        "sliding window": Window,
        "titans-pytorch": lambda: titans(case),
    }
    torch.manual_seed(0)
    layer = makers[name]().to(case.device)
    return torch.compile(layer) if case.compiled and name == "atlas-lm" else layer  # type: ignore[return-value]


def step_of(name: str, case: Case) -> Callable[[], None]:
    """A function that runs forward and backward once."""
    layer = build(name, case)
    x = torch.randn(BATCH, case.length, DIM, device=case.device, requires_grad=True)
    low = case.dtype == "bf16"

    def step() -> None:
        with torch.autocast(case.device, torch.bfloat16, enabled=low):
            y = layer(x)
        y.float().square().mean().backward()
        for p in [x, *layer.parameters()]:
            p.grad = None
        if case.device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def matmul_rate(case: Case) -> float:
    """Multiply-adds a second of a 2048³ product."""
    a = torch.randn(2048, 2048, device=case.device, dtype=DTYPES[case.dtype])

    def multiply() -> None:
        a @ a
        if case.device == "cuda":
            torch.cuda.synchronize()

    multiply()
    return 2048**3 / statistics.median(seconds(multiply) for _ in range(9))


def useful(case: Case) -> float:
    """Multiply-adds of one token, forward and backward: the docstring above."""
    F, P, E, D, C = 1 + HEAD_DIM + RANK, 2 * HIDDEN, HIDDEN, HEAD_DIM, min(case.chunk, case.length)
    forward = 6 * F * P + 5 * E * D
    total = 3 * forward + C * (F + E)
    if case.rule == "newton_schulz":
        shapes = [(min(F, E), max(F, E))] * 2 + [(min(E, D), max(E, D))]
        total += 3 * 5 * sum(2 * M * M * L + M**3 for M, L in shapes) / C
    return HEADS * total + 12 * DIM * DIM


def measure(names: list[str], case: Case, repeats: int) -> list[dict[str, Any]]:
    """Interleaved medians of all layers in this process."""
    keep_freed_memory()
    torch.set_flush_denormal(True)
    steps = {name: step_of(name, case) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():
        step(), step()
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    rate, rows = matmul_rate(case), []
    for name in names:
        median = statistics.median(times[name])
        tokens = BATCH * case.length
        share = tokens * useful(case) / median / rate if name == "atlas-lm" else None
        rows.append({"name": name, **asdict(case), "tokens_per_second": tokens / median, "matmul_share": share})
    return rows


def peak(name: str, case: Case) -> int:
    """Bytes beyond what the process held before the step."""
    step = step_of(name, case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def in_process(mode: str, names: list[str], case: Case, repeats: int) -> Any:
    """The answer of a fresh Python."""
    request = json.dumps({"mode": mode, "names": names, "case": asdict(case), "repeats": repeats})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_layer", "--worker", request], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"{', '.join(names)} at {case}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(request: str) -> None:
    asked = json.loads(request)
    case = Case(**asked["case"])
    if asked["mode"] == "measure":
        print(json.dumps(measure(asked["names"], case, asked["repeats"])))
    else:
        print(json.dumps(peak(asked["names"][0], case)))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layer | rule | dtype | chunk | length | tokens/s | peak MiB | matmul share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row["matmul_share"] is None else f"{row['matmul_share']:.0%}"
        lines.append(
            f"| {row['name']} | {row['rule']} | {row['dtype']} | {row['chunk']} | {row['length']} "
            f"| {row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 2**20:,.0f} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_layer", description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 8, 16, 32, 64, 256, 2048])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--rules", nargs="+", choices=["gradient", "newton_schulz"], default=["gradient"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true", help="our layer through torch.compile")
    parser.add_argument("--peers", action="store_true", help="titans-pytorch and attention beside ours")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    names = ["atlas-lm"] + (["titans-pytorch", "attention", "sliding window"] if args.peers else [])
    rows: list[dict[str, Any]] = []
    cases = [
        Case(chunk, length, dtype, rule, args.device, args.compiled)
        for rule, dtype, length, chunk in product(args.rules, args.dtypes, args.lengths, args.chunks)
        if chunk <= length
    ]
    for i, case in enumerate(cases):
        print(f"\r{i + 1}/{len(cases)} chunk {case.chunk} length {case.length} {case.dtype}  ", end="", file=sys.stderr)
        found = in_process("measure", names, case, args.repeats)
        for row in found:
            row["peak_bytes"] = in_process("peak", [row["name"]], case, 1)
        rows += found
    print(file=sys.stderr)
    print(table(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
