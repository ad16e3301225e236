"""Other people's loggers, read by their own tools. A process of its own trains: they leave threads and files open."""

import csv
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

SMALL = [
    "+experiment=stage1", "model=tiny_deep", "model.dim=32", "model.head_dim=16", "model.rank=15", "model.layers=1",
    "data.source.tokenizer=bytes", "data.seq_len=128", "data.batch_size=2", "data.val_sequences=4", "callbacks=basic",
    "trainer.val_check_interval=10", "trainer.log_every_n_steps=5", "optim.total_steps=20",
]  # fmt: skip


def train(outputs: Path, *words: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """`without`: a package that is not installed there."""
    start = f"import runpy, sys; sys.modules[{without!r}] = None; runpy.run_path('train.py', run_name='__main__')"
    command = [sys.executable, "-c", start] if without else [sys.executable, "train.py"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [*command, *SMALL, "name=x", f"paths.outputs={outputs}", *words],
        cwd=ROOT, env={**kept, "HOME": str(outputs)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    """What metrics.jsonl has, by the logging step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if row.get("train/loss") is not None}


def records(content: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log in blocks of 32 KiB, after a header of 7 bytes."""
    whole, at = b"", 7
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


@pytest.mark.slow
def test_csv(tmp_path: Path) -> None:
    assert train(tmp_path, "logger=csv").returncode == 0
    run = (tmp_path / "x" / "latest").resolve()
    (table,) = run.glob("csv/*/metrics.csv")
    with table.open() as file:
        found = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    assert found == pytest.approx(losses(run))
    assert len(found) == 4


@pytest.mark.slow
def test_wandb_offline_and_resumed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    words = ["logger=wandb", "logger.wandb.offline=true"]
    assert train(tmp_path, *words).returncode == 0
    run = (tmp_path / "x" / "latest").resolve()
    again = train(tmp_path, *words, f"resume={run}", "optim.total_steps=30")
    assert again.returncode == 0, again.stderr[-2000:]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2, "one of each process"
    assert {folder.name.split("-", 3)[3] for folder in folders} == {f"x-{run.name}"}, "of one run"
    found = {}
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in row:
                found[int(row["trainer/global_step"])] = row["train/loss"]
    assert found == pytest.approx(losses(run))
    assert len(found) == 6


@pytest.mark.slow
def test_mlflow_in_local_files(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    assert train(tmp_path, "logger=mlflow").returncode == 0
    run = (tmp_path / "x" / "latest").resolve()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own libraries
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        (found,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
        points = client.get_metric_history(found.info.run_id, "train/loss")
    assert found.info.run_name == f"x-{run.name}"
    assert found.info.status == "FINISHED"
    history = {point.step: point.value for point in points}
    assert history == pytest.approx(losses(run))
    assert found.data.params["model/dim"] == "32"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("wandb", "wandb"), ("mlflow", "mlflow"), ("prometheus", "prometheus_client"),
        ("datadog", "datadog_api_client"), ("otlp", "opentelemetry.exporter.otlp.proto.http"),
    ],
)  # fmt: skip
def test_what_is_not_installed_is_said(name: str, package: str, tmp_path: Path) -> None:
    ended = train(tmp_path, f"logger={name}", without=package)
    assert ended.returncode == 1
    assert f"error: logger.{name} needs {package}: pip install 'atlas-lm[{name}]'" in ended.stderr


@pytest.mark.slow
def test_wandb_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    ended = train(tmp_path, "logger=wandb")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "logger.wandb.offline=true" in ended.stderr
