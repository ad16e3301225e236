"""The loggers for sinks: names, rank zero, and what becomes of a sink that is lost."""

import math
import pickle
import urllib.request

import pytest
from lightning.pytorch.utilities import rank_zero_only

from atlas_lm.loggers.export import DatadogLogger, PrometheusLogger, metrics_of, neutral_name
from tests.support.receivers import free_port


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("train/loss", "train.loss"), ("lr-AdamW/pg1", "lr_adamw.pg1"), ("memory/norm/layer_0", "memory.norm.layer_0"),
        ("epoch", "epoch"), ("/a//b/", "a.b"), ("1st", "metric_1st"), ("x_total", "x"), ("", "metric_"),
        ("é", "metric__"),
    ],
)  # fmt: skip
def test_every_name_becomes_one_that_backends_take(name: str, neutral: str) -> None:
    assert neutral_name(name) == neutral
    metrics_of({name: 1.0}, 0, "m")


def test_what_is_not_finite_is_counted() -> None:
    found = {metric.name: metric for metric in metrics_of({"a": math.nan, "b": math.inf, "c": 1.0}, 7, "m")}
    assert found["nonfinite_metrics_total"].values == (2.0,)
    assert found["logging_step"].values == (7.0,)
    assert {metric.labels for metric in found.values()} == {(("model_name", "m"),)}


def page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def test_it_serves_from_the_first_metrics_to_the_end_and_again() -> None:
    pytest.importorskip("prometheus_client")
    logger = PrometheusLogger("m", port=free_port())
    port = logger._make.args[0]  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="refused"):
        page(port)
    for value in (1.5, 2.5):
        logger.log_metrics({"train/loss": value}, 3)
        assert logger._delivery is not None
        assert logger._delivery.flush(5) == ""
        assert f'atlas_lm:train_loss{{model_name="m"}} {value}' in page(port)
        logger.finalize("success")
        with pytest.raises(OSError, match="refused"):
            page(port)
    pickle.loads(pickle.dumps(logger))


def test_other_ranks_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    port = free_port()
    loggers = [PrometheusLogger("m", port=port) for _ in range(2)]
    for logger in loggers:
        logger.log_metrics({"a": 1.0}, 0)
        assert logger._delivery is None


def test_a_port_that_is_taken_meanwhile_costs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    first, second = PrometheusLogger("m", port=port), PrometheusLogger("m", port=port)
    first.log_metrics({"a": 1.0}, 0)
    for step in range(3):
        second.log_metrics({"a": 1.0}, step)
    first.finalize("success")
    second.finalize("success")
    (line,) = caplog.records
    assert str(port) in line.getMessage()


def test_a_key_is_needed_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datadog_api_client")
    monkeypatch.delenv("DD_API_KEY", raising=False)
    with pytest.raises(ValueError, match="DD_API_KEY"):
        DatadogLogger("m")
