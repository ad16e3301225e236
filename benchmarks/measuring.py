"""What the benchmarks share: interleaved medians, peak memory in fresh processes, tables and JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from atlas_lm.training.malloc import configure_malloc

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def medians(steps: dict[str, Callable[[], Any]], repeats: int, warm: int = 3) -> dict[str, float]:
    """Seconds of each, all of them taken in turn so that a busier minute meets all."""
    prepare()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warm):
            step()
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return {name: statistics.median(found) for name, found in times.items()}


def prepare() -> None:
    """As train.py prepares its process."""
    configure_malloc()
    torch.set_flush_denormal(True)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: str) -> float:
    """Multiply-adds a second of a 2048³ product."""
    a = torch.randn(2048, 2048, device=device, dtype=DTYPES[dtype])

    def multiply() -> None:
        a @ a
        wait(device)

    multiply()
    return 2048**3 / statistics.median(seconds(multiply) for _ in range(9))


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Bytes of one step beyond what the process held before it; to be taken in a fresh process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def in_process(module: str, request: dict[str, Any]) -> Any:
    """The answer of a fresh Python, which runs `module` with --worker."""
    command = [sys.executable, "-m", module, "--worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        raise SystemExit(f"\n{request}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments(module: str, summary: str) -> argparse.ArgumentParser:
    """What every benchmark can be asked for."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of objects")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def progress(text: str) -> None:
    print(f"\r{text:78}", end="", file=sys.stderr, flush=True)


Row = dict[str, Any]


def publish(rows: list[Row], columns: dict[str, Callable[[Row], str]], target: str | None) -> None:
    """Print a Markdown table; write the rows where a file is given."""
    print(file=sys.stderr)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(show(row) for show in columns.values()) + " |")
    if target:
        with open(target, "w") as file:
            json.dump(rows, file, indent=1)


def need_titans() -> Any:
    """titans-pytorch, or the way to get it."""
    try:
        import titans_pytorch
    except ImportError:
        sys.exit('--peers needs titans-pytorch: pip install -e ".[peers]"')
    return titans_pytorch
