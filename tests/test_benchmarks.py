"""The benchmarks run and write what they promise; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIELDS = {"name", "chunk", "length", "dtype", "rule", "tokens_per_second", "peak_bytes", "matmul_share"}


def test_memory_layer(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    asked = ["--chunks", "16", "128", "--lengths", "64", "--dtypes", "fp32", "--repeats", "1", "--json", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_layer", *asked], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(target.read_text())
    assert [(row["name"], row["chunk"], row["length"]) for row in rows] == [("atlas-lm", 16, 64)], (
        "128 > 64 is left out"
    )
    assert set(rows[0]) >= FIELDS
    assert rows[0]["tokens_per_second"] > 0
    assert rows[0]["peak_bytes"] > 0
    assert 0 < rows[0]["matmul_share"] < 1
    assert "| atlas-lm | gradient | fp32 | 16 | 64 |" in done.stdout
