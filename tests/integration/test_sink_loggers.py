"""Training metrics in sinks: what a run logs arrives, and a sink that is down costs it nothing but one line."""

import json
import math
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, finished_run, only_run, small_run, write_corpus
from tests.support.receivers import free_port, receiving


def rows(run: Path) -> list[dict[str, float]]:
    """All of metrics.jsonl, without what differs from run to run."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time" and "seconds" not in k and "_per_" not in k} for row in found]


def logged(run: Path) -> dict[str, float]:
    """The last value of each metric."""
    found: dict[str, float] = {}
    for row in rows(run):
        found.update({name: value for name, value in row.items() if "/" in name and value is not None})
    return found


@contextmanager
def scraping(port: int) -> Iterator[dict[str, float]]:
    """The newest value of each series that the page had, while it was there."""
    found: dict[str, float] = {}
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.02):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    lines = answer.read().decode().splitlines()
            except OSError:
                continue
            found.update((k, float(v)) for k, _, v in (x.rpartition(" ") for x in lines if not x.startswith("#")))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def test_prometheus_has_what_the_run_logged(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    words = ["name=x", "callbacks=basic", "logger=prometheus", f"logger.prometheus.port={port}"]
    with scraping(port) as found:
        run = finished_run(tmp_path, *words, "logger.prometheus.linger=20")
    expected = logged(run)
    assert {"train/loss", "val/loss", "optim/grad_norm"} <= set(expected)
    for name, value in expected.items():
        series = f'atlas_lm:{name.replace("/", "_")}{{model_name="x"}}'
        assert math.isclose(found[series], value, rel_tol=1e-6), name
    assert found['atlas_lm:nonfinite_metrics_total{model_name="x"}'] == 0


def test_datadog_and_otlp_have_what_the_run_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datadog_api_client")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    monkeypatch.setenv("DD_API_KEY", "secret")
    with receiving() as datadog, receiving() as otlp:
        otlp.status, otlp.answer = 200, b""
        add = f"+logger.otlp={{_target_: atlas_lm.loggers.export.OtlpLogger, model_name: x, endpoint: '{otlp.url}'}}"
        words = ["name=x", "callbacks=basic", "logger=datadog", f"logger.datadog.host='{datadog.url}'", add]
        run = finished_run(tmp_path, *words)
        series = [s for request in datadog.requests for s in json.loads(request.body)["series"]]
        last = ExportMetricsServiceRequest.FromString(otlp.requests[-1].body)
    of_datadog = {s["metric"]: s["points"][-1]["value"] for s in series}
    metrics = last.resource_metrics[0].scope_metrics[0].metrics
    of_otlp = {m.name: m.gauge.data_points[0].as_double for m in metrics if m.HasField("gauge")}
    for name, value in logged(run).items():
        for found in (of_datadog, of_otlp):
            assert math.isclose(found[f"atlas_lm.{name.replace('/', '.')}"], value, rel_tol=1e-6), name
    assert "secret" not in "".join(path.read_text(errors="ignore") for path in run.rglob("*") if path.is_file())


@pytest.mark.long
def test_dead_sinks_change_nothing_but_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datadog_api_client")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("DD_API_KEY", "secret")
    dead = f"http://127.0.0.1:{free_port()}"
    add = f"+logger.otlp={{_target_: atlas_lm.loggers.export.OtlpLogger, model_name: x, endpoint: '{dead}'}}"
    runs = {}
    for name, words in {"plain": [], "dead": ["logger=datadog", f"logger.datadog.host='{dead}'", add]}.items():
        (tmp_path / name).mkdir()
        runs[name] = finished_run(tmp_path / name, "name=x", "callbacks=basic", *words)
    assert rows(runs["plain"]) == rows(runs["dead"])
    lines = (runs["dead"] / "train.log").read_text().splitlines()
    assert len([line for line in lines if "sink datadog " in line]) == 1
    assert len([line for line in lines if "sink otlp " in line]) == 1
    ours = [line for line in lines if "127.0.0.1" in line or "opentelemetry" in line or "urllib3" in line]
    assert all("sink " in line for line in ours), ours


def test_a_port_in_use_is_one_line(tmp_path: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client")
    with receiving() as other:
        port = other.server.server_port
        assert small_run(tmp_path, "callbacks=basic", "logger=prometheus", f"logger.prometheus.port={port}") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"port {port} " in line
    assert "in use" in line


def test_a_run_leaves_its_port_to_the_next_one(tmp_path: Path, in_tmp: Path) -> None:
    """As in a sweep, where one process trains several: also after one that failed."""
    pytest.importorskip("prometheus_client")
    port = free_port()
    words = ["callbacks=basic", "logger=prometheus", f"logger.prometheus.port={port}"]
    assert small_run(tmp_path, *words, "optim.lr=1e30", "callbacks.nonfinite_guard.max_consecutive=0") == 1
    for name in ("first", "second"):
        with scraping(port) as found:
            assert small_run(tmp_path, *words, f"name={name}", "logger.prometheus.linger=20") == 0
        assert f'atlas_lm:train_loss{{model_name="{name}"}}' in found


@pytest.mark.slow
def test_of_two_ranks_one_exports(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    words = ["trainer.devices=2", "trainer.strategy=ddp", "logger=prometheus", f"logger.prometheus.port={port}"]
    command = [
        sys.executable, "train.py", "data=text", write_corpus(tmp_path / "corpus"), *SMALL_MODEL, *SMALL_DATA,
        *FEW_STEPS, "name=x", "callbacks=basic", f"paths.outputs={tmp_path / 'outputs'}", *words,
        "logger.prometheus.linger=20",
    ]  # fmt: skip
    with scraping(port) as found:
        ended = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    expected = logged(only_run(tmp_path / "outputs"))
    assert found['atlas_lm:train_loss{model_name="x"}'] == pytest.approx(expected["train/loss"])
    assert found['atlas_lm:val_loss{model_name="x"}'] == pytest.approx(expected["val/loss"])
    assert "sink " not in ended.stderr
