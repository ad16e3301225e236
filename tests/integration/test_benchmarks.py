"""The benchmarks run and write what they promise; what they measure is not judged here."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import context, faults, gpu, memory_layer, soak, train_step
from benchmarks.safeguards import PROBES, standard_error
from tests.support import ROOT
from tests.support.launching import SMALL_MODEL

FIELDS = {"name", "chunk", "length", "dtype", "rule", "tokens_per_second", "peak_bytes", "matmul_share"}


def run(name: str, tmp_path: Path, *asked: str) -> tuple[list[dict[str, Any]], str]:
    target = tmp_path / "rows.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *asked, "--repeats", "1", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(target.read_text()), done.stdout


def in_workers(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], *asked: str
) -> tuple[list[dict[str, Any]], str]:
    """As `run`, for those that measure in processes of their own."""
    target = tmp_path / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["benchmark", *asked, "--repeats", "1", "--json", str(target)])
        benchmark.main()
    return json.loads(target.read_text()), capsys.readouterr().out


@pytest.mark.slow
def test_memory_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--chunks", "16", "128", "--lengths", "64", "--dtypes", "fp32"]
    rows, output = in_workers(memory_layer, tmp_path, capsys, *asked)
    assert [(row["name"], row["chunk"], row["length"]) for row in rows] == [("atlas-lm", 16, 64)], (
        "128 > 64 is left out"
    )
    assert set(rows[0]) >= FIELDS
    assert rows[0]["tokens_per_second"] > 0
    assert rows[0]["peak_bytes"] > 0
    assert 0 < rows[0]["matmul_share"] < 1
    assert "| atlas-lm | gradient | fp32 | 16 | 64 |" in output


@pytest.mark.slow
def test_train_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--layers", "1", "--dim", "64", "--chunks", "16", "--lengths", "64", "--dtypes", "fp32", "--peers"]
    rows, output = in_workers(train_step, tmp_path, capsys, *asked, "--without", "titans-pytorch MAC")
    assert [row["name"] for row in rows] == ["atlas-lm", "transformer"]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] > 0
    assert "| transformer | fp32 | 16 | 64 |" in output


@pytest.mark.slow
def test_tnt(tmp_path: Path) -> None:
    rows, output = run("tnt", tmp_path, "--length", "128", "--dtypes", "fp32")
    assert set(rows[0]) >= FIELDS
    assert rows[0]["name"] == "unsharded 8"
    assert rows[0]["speedup"] == 1
    assert "| shards 64 | fp32 |" in output


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    rows, _ = run("decode", tmp_path, "--positions", "10", "300", "--tokens", "4")
    assert [row["position"] for row in rows] == [10, 300]
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] > 0


def test_the_standard_error_of_a_median() -> None:
    draw = random.Random(1)
    normal = [draw.gauss(0.01, 0.02) for _ in range(400)]
    assert standard_error(normal) == pytest.approx(math.sqrt(math.pi / 2) * 0.02 / math.sqrt(400), rel=0.25)
    assert standard_error(normal) == standard_error(normal)
    assert standard_error([0.01]) == 0


@pytest.mark.slow
def test_safeguards(tmp_path: Path) -> None:
    asked = ["--steps", "2", "--pairs", "1", *SMALL_MODEL, "data.seq_len=64", "data.batch_size=1"]
    rows, output = run("safeguards", tmp_path, *asked)
    shares = {row["name"]: row["share"] for row in rows}
    parts = [row["share"] for row in rows[: list(shares).index("all, time in hooks")]]
    assert {"niah_probe", "spike_rollback", "nonfinite_guard", "gate_monitor", "weight_integrity"} <= shares.keys()
    assert shares["all, time in hooks"] == pytest.approx(sum(parts)) != 0
    probes = sum(shares[name] for name in PROBES if name in shares)
    assert shares["all but the probes, time in hooks"] == pytest.approx(sum(parts) - probes)
    assert shares["all: blocks and probes"] == pytest.approx(
        shares["all but the probes, blocks with / without"] + probes
    )
    assert "ratios of blocks" in output


def test_an_unknown_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train_step", "--model", "tinny", "--lengths", "64"])
    with pytest.raises(SystemExit, match="no model 'tinny'; choose one of"):
        train_step.main()


# The fault suite


def fault_row(fault: str, **values: Any) -> dict[str, Any]:
    return {
        "fault": fault, "seed": 0, "variant": "ours", "status": "finished", "val_loss": 2.0,
        "losses": faults.digest([3.0, 2.5]),
        "records_in_order": True, "detected_by": None, "action": None, **values,
    }  # fmt: skip


def test_faults_are_held_against_the_clean_run_of_their_seed_and_ranks() -> None:
    rows = [
        fault_row("clean", alarms=0), fault_row("clean_two_ranks", val_loss=1.0, alarms=2),
        fault_row("inf_loss", val_loss=2.02, detected_by="guard", steps_to_detection=1, action="1 skip", steps_lost=1),
        fault_row("nan_gradient", val_loss=None),
        fault_row("sigterm"), fault_row("truncated", losses=faults.digest([3.0, 2.6])),
        fault_row("shard_flipped", status=None),
        fault_row("kills", checkpoints_lost=3),
    ]  # fmt: skip
    shown = {row["fault"]: {name: show(row) for name, show in faults.COLUMNS.items()} for row in faults.table(rows)}
    loss = "final loss, worst run against clean"
    assert shown["Inf in the loss"][loss] == "+1.00%"
    assert shown["Inf in the loss"]["detected by"] == "guard (1/1)"
    assert shown["NaN in one rank's gradient"][loss] == "NaN"
    assert shown["NaN in one rank's gradient"]["detected by"] == "nobody (0/1)"
    assert shown["SIGTERM at a random step"][loss] == "every step bitwise"
    assert shown["SIGKILL, newest checkpoint truncated"][loss] == "+0.00%", "another loss on the way"
    assert shown["a byte of the prepared data flipped"][loss] == ""
    assert shown["nothing, 2 ranks"]["detected by"] == "2 false alarms in 1"


def test_detection_is_read_from_the_records(tmp_path: Path) -> None:
    run = faults.Run(faults.NAMES["garbage_tokens"], 0, "ours", tmp_path)
    (tmp_path / "struck.json").write_text('{"batch": 5, "step": 4, "time": 0}')

    def row(step: int, done: int, **values: float) -> dict[str, Any]:
        return {"step": step, "global_step": done, **values}

    quiet = [row(i, i + 1) for i in range(4)]
    assert faults.detection(run, quiet) == (None, None, None, 0)
    skips = [row(4, 5, **{"outlier_guard/outliers": 1}), row(5, 6, **{"outlier_guard/outliers": 2})]
    assert faults.detection(run, quiet + skips) == ("outlier guard", 1, "2 skips", 2)
    back = [row(6, 3, **{"spike_rollback/count": 1}), row(7, 4)]
    assert faults.detection(run, quiet + skips + back) == ("outlier guard", 1, "2 skips, 1 rollback", 6)


def test_a_soak_is_passed_only_by_what_it_shows() -> None:
    good = {
        "exit_code": 0, "memory_spread": 0.02, "open_files": [8], "rollbacks": 5, "skipped_steps": 2,
        "rollbacks_expected_at_least": 5, "skips_expected_at_least": 2,
        "verdict": "stopped early at step 9 of 10: …; 5 rollbacks and 2 skipped steps on the way",
    }  # fmt: skip
    assert soak.passed(good) == []
    for name, value in (
        ("exit_code", 1), ("memory_spread", 0.06), ("open_files", [8, 9]), ("rollbacks", 4), ("skipped_steps", 1),
        ("verdict", "finished"),
    ):  # fmt: skip
        assert soak.passed({**good, name: value}) != [], name


def test_gpu_parts_run_small_on_a_cpu(tmp_path: Path) -> None:
    setting = gpu.Setting(device="cpu", toy=True)
    found = gpu.correctness(setting)
    assert found["chunk 7 fp32"]["output"] < found["chunk 7 fp32"]["gradient"] * 10 < 1e-4
    assert 1e-4 < found["chunk 7 bf16"]["gradient"] < 5e-2
    assert all(case["repeats_bitwise"] for case in found.values())
    assert gpu.in_a_process("environment", setting, 60)["torch"] == torch.__version__
    late = gpu.in_a_process("environment", setting, 0.01)
    assert "took more than" in late["failed"]
    page = gpu.draw([{"environment": {"torch": "2", "part_seconds": 1.0}, "ceilings": {"copy_gb_per_s": 1234.5}}])
    assert "| copy_gb_per_s | 1,234 |" in page


@pytest.mark.slow
def test_gpu_benchmark_as_a_whole_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--toy", "--out", str(tmp_path / "gpu.json")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=900, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {part: figures.get("failed") for part, figures in found.items()} == dict.fromkeys(gpu.PARTS)
    if importlib.util.find_spec("triton"):
        assert found["kernels"]["chunk 16: triton"]["passed_trial"] is True
    assert found["run"]["preempted"] == {"as_documented": True, "resumed": True, "weights": True, "losses": True}


def test_the_page_of_the_gpu_holds_the_figures_of_its_file() -> None:
    root = ROOT / "docs"
    runs = [json.loads(path.read_text()) for path in sorted((root / "results").glob("gpu*.json"))]
    assert (root / "gpu.md").read_text() == gpu.draw(runs)


def test_what_far_text_is_worth_to_a_run(guarded_run: Path) -> None:
    """Two seeds of the same run are the same; a model that sees all that it is near to gains nothing."""
    found = context.measure([str(guarded_run), str(guarded_run)], 48, 8, 4)
    assert found.whole_SNT.shape == (2, 4, 48)
    assert torch.equal(*found.whole_SNT)
    assert found.gain_SNT.abs().max() < 1e-5
    assert context.measure([str(guarded_run)], 8, 8, 4).gain_SNT.abs().max() > 1e-4
