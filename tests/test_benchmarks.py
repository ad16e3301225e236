"""The benchmarks run and write what they promise; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launching import SMALL_MODEL

ROOT = Path(__file__).parents[1]
FIELDS = {"name", "chunk", "length", "dtype", "rule", "tokens_per_second", "peak_bytes", "matmul_share"}


def run(name: str, tmp_path: Path, *asked: str) -> tuple[list[dict[str, Any]], str]:
    target = tmp_path / "rows.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *asked, "--repeats", "1", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(target.read_text()), done.stdout


def test_memory_layer(tmp_path: Path) -> None:
    rows, output = run("memory_layer", tmp_path, "--chunks", "16", "128", "--lengths", "64", "--dtypes", "fp32")
    assert [(row["name"], row["chunk"], row["length"]) for row in rows] == [("atlas-lm", 16, 64)], (
        "128 > 64 is left out"
    )
    assert set(rows[0]) >= FIELDS
    assert rows[0]["tokens_per_second"] > 0
    assert rows[0]["peak_bytes"] > 0
    assert 0 < rows[0]["matmul_share"] < 1
    assert "| atlas-lm | gradient | fp32 | 16 | 64 |" in output


def test_train_step(tmp_path: Path) -> None:
    asked = ["--layers", "1", "--dim", "64", "--chunks", "16", "--lengths", "64", "--dtypes", "fp32", "--peers"]
    rows, output = run("train_step", tmp_path, *asked, "--without", "titans-pytorch MAC")
    assert [row["name"] for row in rows] == ["atlas-lm", "transformer"]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] > 0
    assert "| transformer | fp32 | 16 | 64 |" in output


def test_tnt(tmp_path: Path) -> None:
    rows, output = run("tnt", tmp_path, "--length", "128", "--dtypes", "fp32")
    assert set(rows[0]) >= FIELDS
    assert rows[0]["name"] == "unsharded 8"
    assert rows[0]["speedup"] == 1
    assert "| shards 64 | fp32 |" in output


def test_decode(tmp_path: Path) -> None:
    rows, _ = run("decode", tmp_path, "--positions", "10", "300", "--tokens", "4")
    assert [row["position"] for row in rows] == [10, 300]
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] > 0


def test_safeguards(tmp_path: Path) -> None:
    asked = ["--steps", "2", "--pairs", "1", *SMALL_MODEL, "data.seq_len=64", "data.batch_size=1"]
    rows, output = run("safeguards", tmp_path, *asked)
    shares = {row["name"]: row["share"] for row in rows}
    assert {"niah_probe", "spike_rollback", "nonfinite_guard", "gate_monitor", "all safeguards"} <= shares.keys()
    parts = [share for name, share in shares.items() if name in rows_of_callbacks(rows)]
    assert 0 < shares["all safeguards"] <= sum(parts) * 1.01
    assert "whole run, with / without" in output


def rows_of_callbacks(rows: list[dict[str, Any]]) -> set[str]:
    names = [row["name"] for row in rows]
    return set(names[: names.index("all safeguards")])


def test_an_unknown_model_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks.train_step", "--model", "tinny", "--lengths", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "no model 'tinny'; choose one of" in done.stderr
