"""What the Triton kernels need of a GPU, compiled without one: python -m benchmarks.kernels

For each kernel and each of its three variants: registers of a thread, bytes that spill, shared memory of a program, and
how many of its matrix products are wgmma. For compute capability 9.0; takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = (16, 32, 64)  # BLOCK_C
LOW = (
    "phi", "phi_q", "v", "by_initial", "q_by_initial", "key_scores", "scores", "y", "dy", "pre", "read_pre", "hidden",
    "hidden_q", "error_in", "error_out", "back", "share",
)  # fmt: skip
NUMBERS = {"radius": "fp32", "smallest": "fp32"}
WHOLE = ("K", "C", "S", "start", "count", "passes", "complete")


def compiled(kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> dict[str, int]:
    """Resources of a kernel: registers, spilled bytes, shared memory in bytes, wgmma products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    low = {name for known in LOW for name in (known, f"d{known}")} - {"derror_in", "derror_out", "dhidden", "dshare"}

    def kind(name: str) -> str:
        if name in WHOLE:
            return "i32"
        if name == "zero":
            return "*i32"
        return NUMBERS.get(name) or ("*bf16" if name in low else "*fp32")

    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
    places = {name: (n,) for n, name in enumerate(kernel.arg_names)}
    attributes = {places[name]: [["tt.divisibility", 16]] for name in names if kind(name).startswith("*")}
    used = {places[name]: value for name, value in constants.items() if name in places}
    source = ASTSource(kernel, signature, constexprs=used, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (
        int(number) for number in re.findall(r"(?:REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)[:3]
    )
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": found.metadata.shared,
        "wgmma": found.asm["ptx"].count("wgmma.mma_async"),
        "mma": found.asm["ptx"].count("mma.sync"),
    }


def measure(sizes: list[int], features: int, hidden: int, width: int) -> list[dict[str, Any]]:
    """All kernels, at every size."""
    from atlas_lm.memory.kernels.triton import learn, learn_backward, read, read_backward
    from atlas_lm.memory.loop.triton import compile_time

    rows = []
    for size in sizes:
        for kernel in (learn.learn, read.read, read_backward.read_backward, learn_backward.learn_backward):
            constants, options = compile_time(kernel.__name__, size, features, hidden, hidden, width, "bfloat16")
            found = compiled(kernel, constants, options)
            rows.append({"kernel": kernel.__name__, "block": size, **found, **options, "BLOCK_F": constants["BLOCK_F"]})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--width", type=int, default=2, help="2 gated_mlp, 1 mlp, 0 linear")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args.sizes, args.features, args.hidden, args.width)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
