"""What the Triton kernels need of a GPU of compute capability 9.0, compiled here without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def resources(out: Path, *arguments: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Of all kernels, by name and block."""
    env = os.environ | {"TRITON_INTERPRET": "0"}  # what the interpreter runs cannot be compiled
    command = [sys.executable, "-m", "benchmarks.kernels", "--json", str(out), *arguments]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=550)
    return {(row["kernel"], row["block"]): row for row in json.loads(out.read_text())}


def check(found: dict[tuple[str, int], dict[str, Any]], blocks: tuple[int, ...]) -> None:
    assert set(found) == {(k, b) for k in ("learn", "read", "read_backward", "learn_backward") for b in blocks}
    for key, row in found.items():
        assert row["spilled"] <= 512, key
        assert row["shared"] <= 227 * 1024, key
        assert row["wgmma"] + row["mma"] > 0, key
    for block in blocks:
        assert found["learn", block]["wgmma"] > 0, "forward"
        assert found["learn_backward", block]["wgmma"] > 0, "backward"


@pytest.mark.slow
def test_registers_shared_memory_and_wgmma(tmp_path):
    check(resources(tmp_path / "kernels.json"), (16, 32, 64))


@pytest.mark.slow
@pytest.mark.parametrize("width", ["0", "1"])
def test_the_other_networks(width, tmp_path):
    check(resources(tmp_path / "kernels.json", "--width", width, "--sizes", "64"), (64,))
