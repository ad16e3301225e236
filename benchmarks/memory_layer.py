"""One memory layer, forward and backward, beside its peers: python -m benchmarks.memory_layer [--peers] [--json FILE]

Every case is a process of its own: all layers of one chunk size, length and precision, interleaved, medians. Peak
memory comes from further processes, one a layer, in which it does one step. A layer takes (batch, length, dim) and
gives the same back: projections, short convolution and norms are part of it.

The peer has the network that it comes with: two layers, GELU, on inputs as they are; its default hidden size is four
times the head dim. `--network mlp --features linear --hidden 256` gives ours the same; without these it is the one that
the models use, gated and on a quadratic sketch.

Useful operations of the memory, per token and head, in multiply-adds, with F features, P pre-activations, E hidden
units, D outputs and a chunk of C tokens:

    forward   first layer: pre-activations of key and query, the update of w and of s       4 F P
              second layer: output, the way back, read, the update of both                  5 E D
              curvature: φφᵀ, hhᵀ                                                           C (F + E)
    backward  twice all of that, but not the curvature's
    Newton–Schulz adds 2 (2 M² L + M³) a step and matrix of M × L, M ≤ L, per chunk of C tokens

and those of the projections, 4 dim² forward and 8 backward. Their share of what the same time would have been enough
for, at this machine's rate for a 2048³ product in that precision, is the `matmul_share`. What an implementation
computes again, pads, or computes apart although it could be had at once, is not counted. Titans' share is not given:
its operations are others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.features import build_features
from atlas_lm.memory.network import build_network
from atlas_lm.model.attention import SlidingWindowAttention
from atlas_lm.model.block import MemoryBranch
from benchmarks import measuring

MODULE = "benchmarks.memory_layer"
DIM, HEADS, HEAD_DIM, RANK, BATCH = 256, 4, 64, 63, 2


@dataclass(frozen=True)
class Case:
    """One row of conditions."""

    chunk: int
    length: int
    dtype: str
    rule: str
    device: str
    compiled: bool
    network: str = "gated_mlp"
    features: str = "sketch"
    hidden: int = 64


class MemoryLayer(nn.Module):
    """Our memory branch with one unsharded memory, read at its chunk's start, and an output projection."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        spec = MemorySpec(
            DIM, HEADS, HEAD_DIM, (), case.chunk, -(-case.length // case.chunk) * case.chunk,
            network=case.network, features=case.features, rank=RANK, hidden=case.hidden, update=case.rule,
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
        return self.out(self.attention(x, None)[0])


def titans(case: Case) -> nn.Module:
    """titans-pytorch with the papers' semantics: `batch_size` = chunk, so that its weights move at every chunk."""
    peer = measuring.need_titans()
    model = peer.MemoryMLP(dim=HEAD_DIM, depth=2, expansion_factor=case.hidden / HEAD_DIM)
    memory = peer.NeuralMemory(
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
    dy = torch.randn(BATCH, case.length, DIM, device=case.device)
    low = case.dtype == "bf16"

    def step() -> None:
        with torch.autocast(case.device, torch.bfloat16, enabled=low):
            y = layer(x)
        y.backward(dy.to(y.dtype))
        for p in [x, *layer.parameters()]:
            p.grad = None
        measuring.wait(case.device)

    return step


def useful(case: Case) -> float:
    """Multiply-adds of one token, forward and backward: the docstring above."""
    F, C = build_features(case.features, HEAD_DIM, RANK).dim_out, min(case.chunk, case.length)
    return HEADS * useful_of_head(case.network, F, HEAD_DIM, case.hidden, C, case.rule) + 12 * DIM * DIM


def useful_of_head(kind: str, features: int, head_dim: int, hidden: int, C: int, rule: str) -> float:
    """Multiply-adds of a memory's head for one token, forward and backward."""
    network = build_network(kind, False)
    shapes = network.shapes(head_dim, features, hidden)
    (R, P), second = shapes[0], shapes[1:]
    forward = 4 * R * P + sum(5 * E * D for E, D in second)
    total = 3 * forward + C * (R + sum(E for E, _ in second))
    if rule == "newton_schulz":
        width = 1 if network.activation is None else network.activation.width
        matrices = [(R, P // width)] * width + second
        sides = [(min(shape), max(shape)) for shape in matrices]
        total += 3 * 5 * sum(2 * M * M * L + M**3 for M, L in sides) / C
    return total


def measure(names: list[str], case: Case, repeats: int) -> list[dict[str, Any]]:
    """Interleaved medians of all layers in this process."""
    found = measuring.medians({name: step_of(name, case) for name in names}, repeats)
    rate, tokens, rows = measuring.matmul_rate(case.device, case.dtype), BATCH * case.length, []
    for name, median in found.items():
        share = tokens * useful(case) / median / rate if name == "atlas-lm" else None
        rows.append({"name": name, **asdict(case), "tokens_per_second": tokens / median, "matmul_share": share})
    return rows


def worker(request: str) -> None:
    asked = json.loads(request)
    case = Case(**asked["case"])
    if "peak" in asked:
        print(json.dumps(measuring.peak_bytes(step_of(asked["peak"], case), case.device)))
    else:
        print(json.dumps(measure(asked["names"], case, asked["repeats"])))


def main() -> None:
    parser = measuring.arguments(MODULE, __doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 8, 16, 32, 64, 256, 2048])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtypes", nargs="+", choices=list(measuring.DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--rules", nargs="+", choices=["gradient", "newton_schulz"], default=["gradient"])
    parser.add_argument("--network", choices=["gated_mlp", "mlp", "linear"], default="gated_mlp")
    parser.add_argument("--features", choices=["linear", "quadratic", "sketch"], default="sketch")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--compiled", action="store_true", help="our layer through torch.compile")
    parser.add_argument("--peers", action="store_true", help="titans-pytorch and attention beside ours")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    names = ["atlas-lm"] + (["titans-pytorch", "attention", "sliding window"] if args.peers else [])
    if args.peers:
        measuring.need_titans()
    rows: list[dict[str, Any]] = []
    cases = [
        Case(chunk, length, dtype, rule, args.device, args.compiled, args.network, args.features, args.hidden)
        for rule, dtype, length, chunk in product(args.rules, args.dtypes, args.lengths, args.chunks)
        if chunk <= length
    ]
    for i, case in enumerate(cases):
        measuring.progress(f"{i + 1}/{len(cases)} chunk {case.chunk} length {case.length} {case.dtype} {case.rule}")
        found = measuring.in_process(MODULE, {"case": asdict(case), "names": names, "repeats": args.repeats})
        for row in found:
            row["peak_bytes"] = measuring.in_process(MODULE, {"case": asdict(case), "peak": row["name"]})
        rows += found
    columns = {
        "layer": lambda row: row["name"],
        "rule": lambda row: row["rule"],
        "dtype": lambda row: row["dtype"],
        "chunk": lambda row: str(row["chunk"]),
        "length": lambda row: str(row["length"]),
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:,.0f}",
        "matmul share": lambda row: "" if row["matmul_share"] is None else f"{row['matmul_share']:.0%}",
    }
    measuring.publish(rows, columns, args.json)


if __name__ == "__main__":
    main()
