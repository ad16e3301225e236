"""TNT's claim on our code: shards in parallel against one memory from end to end: python -m benchmarks.tnt

A memory branch (dim 256, 4 heads), forward and backward, batch 1. The yardstick is one unsharded memory at chunk 8 (as
Titans); beside it TNT's hierarchy, a global memory with chunks of 2048 and a local one that restarts every 2048
tokens, its shards in parallel, at several local chunk sizes. TNT's Table 1 (150M, TPU, hours to one loss) is quoted.
Medians, interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.model.block import MemoryBranch
from benchmarks import measuring

DIM, HEADS, HEAD_DIM, SHARD = 256, 4, 64, 2048
PAPER = {"unsharded 8": 1.0, "shards 8": 7.68, "shards 16": 11.78, "shards 32": 15.92, "shards 64": 17.37,
         "shards 128": 16.75, "unsharded 16": 1.81, "unsharded 32": 3.02, "unsharded 64": 4.67}  # fmt: skip


def branch(chunk: int, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    local, whole = ((chunk,), SHARD) if sharded else ((), chunk)
    spec = MemorySpec(DIM, HEADS, HEAD_DIM, local, whole, SHARD, rank=63)
    return MemoryBranch(spec, conv=4)


def step_of(layer: nn.Module, x: Tensor, low: bool) -> Callable[[], None]:
    layer = layer.to(x.device)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            y, _, _ = layer(x, layer.initial_conv(x.size(0)), None, None)
        y.sum().backward()
        layer.zero_grad()
        measuring.wait(x.device.type)

    return step


def main() -> None:
    parser = measuring.arguments("benchmarks.tnt", __doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--dtypes", nargs="+", choices=list(measuring.DTYPES), default=["fp32", "bf16"])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        measuring.progress(f"{dtype}, {args.length} tokens")
        x = torch.randn(1, args.length, DIM, device=args.device, requires_grad=True)
        cases = {f"unsharded {c}": branch(c, False) for c in (8, 64)}
        cases |= {f"shards {c}": branch(c, True) for c in (8, 16, 32, 64, 128)}
        steps = {name: step_of(layer, x, dtype == "bf16") for name, layer in cases.items()}
        found = measuring.medians(steps, args.repeats, warm=2)
        for name, median in found.items():
            rows.append({
                "name": name, "chunk": int(name.split()[1]), "length": args.length, "dtype": dtype, "rule": "gradient",
                "tokens_per_second": args.length / median, "peak_bytes": None, "matmul_share": None,
                "speedup": found["unsharded 8"] / median, "paper": PAPER.get(name),
            })  # fmt: skip
    columns = {
        "memory": lambda row: row["name"],
        "dtype": lambda row: row["dtype"],
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "speed-up": lambda row: f"{row['speedup']:.2f}",
        "TNT Table 1": lambda row: "" if row["paper"] is None else f"{row['paper']:.2f}",
    }
    measuring.publish(rows, columns, args.json)


if __name__ == "__main__":
    main()
