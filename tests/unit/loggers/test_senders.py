"""Named numbers arrive where they are sent: in a page that is scraped, and in requests to servers on loopback."""

import json
import math
import socket
import struct
import urllib.request
from collections.abc import Iterator

import pytest

from atlas_lm.loggers.senders.datadog import DatadogSender
from atlas_lm.loggers.senders.metric import OTHER, SERIES, Bound, Metric, labelled
from atlas_lm.loggers.senders.otlp import OtlpSender
from atlas_lm.loggers.senders.prometheus import PrometheusSender
from tests.support.receivers import Receiver, receiving

M = labelled(model_name="m")
BATCH = [
    Metric("tokens_total", "counter", (2.0, 3.0), M, "{token}", "tokens"),
    Metric("memory.weight_norm", "gauge", (1.0, 7.0), M),
    Metric("wait_seconds", "histogram", (0.1, 0.2, math.nan, 5.0), M, "s", buckets=(0.15, 1.0)),
]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


# The metric


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tokens", "counter"), ("loss_total", "gauge"), ("Loss", "gauge"), ("a/b", "gauge"), ("", "gauge")],
)
def test_a_name_that_not_all_backends_take_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=repr(name)):
        Metric(name, kind, (1.0,))  # type: ignore[arg-type]


def test_series_are_bounded_whatever_the_labels() -> None:
    bound = Bound()
    metrics = [Metric("x", "gauge", (1.0,), labelled(model_name="m", trace=str(i))) for i in range(1000)]
    found = {metric.labels for metric in bound(metrics)}
    assert len(found) == SERIES + 1
    assert labelled(model_name=OTHER, trace=OTHER) in found
    assert next(iter(bound(metrics[:1]))).labels == metrics[0].labels, "those that are known stay"


# Prometheus


@pytest.fixture
def exporter() -> Iterator[PrometheusSender]:
    pytest.importorskip("prometheus_client")
    sender = PrometheusSender(port=0)
    yield sender
    sender.close()


def page(sender: PrometheusSender) -> dict[str, float]:
    """Series and values, as a scraper reads them."""
    with urllib.request.urlopen(sender.url, timeout=5) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_page_is_scraped(exporter: PrometheusSender) -> None:
    exporter.take(BATCH)
    exporter.take(BATCH[:2])
    found = page(exporter)
    assert found['atlas_lm:tokens_total{model_name="m"}'] == 10
    assert found['atlas_lm:memory_weight_norm{model_name="m"}'] == 7
    assert found['atlas_lm:wait_seconds_bucket{le="0.15",model_name="m"}'] == 1
    assert found['atlas_lm:wait_seconds_bucket{le="+Inf",model_name="m"}'] == 3
    assert found['atlas_lm:wait_seconds_sum{model_name="m"}'] == pytest.approx(5.3), "without what is not finite"
    assert exporter.scrapes == 1


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "*/*"])
def test_a_server_gets_the_names_of_the_page(exporter: PrometheusSender, accept: str) -> None:
    """A Prometheus server asks for OpenMetrics, as which the client would write other names."""
    exporter.take(BATCH)
    request = urllib.request.Request(exporter.url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert b'\natlas_lm:tokens_total{model_name="m"} 5.0\n' in answer.read()


def test_a_server_that_hangs_up_leaves_no_traceback(
    exporter: PrometheusSender, capfd: pytest.CaptureFixture[str]
) -> None:
    exporter.take([Metric(f"m{i}", "gauge", (1.0,), M) for i in range(3000)])  # more than a socket's buffer
    reset = struct.pack("ii", 1, 0)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", exporter.port)) as scraper:
            scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    page(exporter)
    assert capfd.readouterr().err == ""


def test_a_gauge_that_is_not_finite_is_shown(exporter: PrometheusSender) -> None:
    exporter.take([Metric("loss", "gauge", (math.nan,), M)])
    assert math.isnan(page(exporter)['atlas_lm:loss{model_name="m"}'])


def test_a_port_in_use_is_named(exporter: PrometheusSender) -> None:
    with pytest.raises(ValueError, match=f"port {exporter.port} .* in use"):
        PrometheusSender(port=exporter.port)
    with pytest.raises(ValueError, match="65535"):
        PrometheusSender(port=70000)


def test_the_port_is_free_after_close() -> None:
    pytest.importorskip("prometheus_client")
    first = PrometheusSender(port=0)
    first.close()
    PrometheusSender(port=first.port).close()


def test_closing_waits_for_a_scrape_and_not_longer() -> None:
    pytest.importorskip("prometheus_client")
    import threading
    import time

    for reads in (True, False):
        sender = PrometheusSender(port=0, linger=1.0 if not reads else 30.0)
        sender.take(BATCH)
        if reads:
            threading.Timer(0.3, page, [sender]).start()
        start = time.monotonic()
        sender.close()
        assert time.monotonic() - start < 10
        assert time.monotonic() - start > (0.2 if reads else 0.9)


# Datadog


def sent(receiver: Receiver) -> dict[str, dict[str, object]]:
    assert {request.path for request in receiver.requests} == {"/api/v2/series"}
    assert {request.headers["dd-api-key"] for request in receiver.requests} == {"secret"}
    return {s["metric"]: s for request in receiver.requests for s in json.loads(request.body)["series"]}


def test_datadog_gets_counts_and_gauges(receiver: Receiver) -> None:
    pytest.importorskip("datadog_api_client")
    sender = DatadogSender(receiver.url, "secret")
    sender.take(BATCH)
    sender.push()
    sender.push()
    sender.close()
    assert len(receiver.requests) == 1, "nothing twice"
    series = sent(receiver)
    values = {name: (s["type"], [point["value"] for point in s["points"]]) for name, s in series.items()}
    count, gauge = 1, 3  # of Datadog's API
    assert values == {
        "atlas_lm.tokens_total": (count, [5]),
        "atlas_lm.memory.weight_norm": (gauge, [7]),
        "atlas_lm.wait_seconds.count": (count, [3]),
        "atlas_lm.wait_seconds.avg": (gauge, [pytest.approx(5.3 / 3)]),
        "atlas_lm.wait_seconds.95percentile": (gauge, [5]),
        "atlas_lm.wait_seconds.max": (gauge, [5]),
    }
    assert series["atlas_lm.tokens_total"]["tags"] == ["model_name:m"]
    assert series["atlas_lm.wait_seconds.max"]["unit"] == "second"
    assert abs(series["atlas_lm.tokens_total"]["points"][0]["timestamp"] - BATCH[0].time) <= 2


def test_two_counts_of_a_second_are_both_kept(receiver: Receiver) -> None:
    """Of two points of one second Datadog keeps one."""
    pytest.importorskip("datadog_api_client")
    sender = DatadogSender(receiver.url, "secret")
    for _ in range(2):
        sender.take(BATCH[:1])
        sender.push()
    points = [s["points"][0] for request in receiver.requests for s in json.loads(request.body)["series"]]
    assert [point["value"] for point in points] == [5, 5]
    assert len({point["timestamp"] for point in points}) == 2


def test_datadog_has_what_it_did_not_take(receiver: Receiver) -> None:
    pytest.importorskip("datadog_api_client")
    sender = DatadogSender(receiver.url, "secret")
    sender.take(BATCH)
    receiver.status = 503
    with pytest.raises(RuntimeError, match="503"):
        sender.push()
    receiver.status = 202
    receiver.requests.clear()
    sender.push()
    assert "atlas_lm.tokens_total" in sent(receiver)


def test_datadog_drops_what_is_refused(receiver: Receiver) -> None:
    pytest.importorskip("datadog_api_client")
    sender = DatadogSender(receiver.url, "secret")
    sender.take(BATCH)
    receiver.status = 403
    with pytest.raises(RuntimeError, match=r"403.*DD_API_KEY"):
        sender.push()
    receiver.requests.clear()
    sender.push()
    assert not receiver.requests


def test_datadog_needs_a_key_and_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datadog_api_client")
    monkeypatch.delenv("DD_API_KEY", raising=False)
    with pytest.raises(ValueError, match="DD_API_KEY"):
        DatadogSender()
    with pytest.raises(ValueError, match="'localhost:80'"):
        DatadogSender("localhost:80", "secret")


# OpenTelemetry


def otlp_points(receiver: Receiver) -> dict[str, object]:
    """Of the last request, parsed as the protobuf that it must be: name → metric."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    request = receiver.requests[-1]
    assert request.path == "/v1/metrics"
    assert request.headers["content-type"] == "application/x-protobuf"
    found = ExportMetricsServiceRequest.FromString(request.body)
    (resource,) = found.resource_metrics
    assert "atlas-lm" in {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
    return {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}


def test_otlp_gets_sums_gauges_and_histograms(receiver: Receiver) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    receiver.status, receiver.answer = 200, b""
    sender = OtlpSender(receiver.url)
    sender.take([*BATCH, Metric("gen_ai.server.time_to_first_token", "histogram", (0.5,), M, "s")])
    sender.push()
    sender.take(BATCH[:1])
    sender.push()
    sender.close()
    found = otlp_points(receiver)
    (tokens,) = found["atlas_lm.tokens"].sum.data_points
    assert tokens.as_double == 10
    assert found["atlas_lm.tokens"].sum.is_monotonic
    assert found["atlas_lm.tokens"].unit == "{token}"
    assert [(a.key, a.value.string_value) for a in tokens.attributes] == [("model_name", "m")]
    assert found["atlas_lm.memory.weight_norm"].gauge.data_points[0].as_double == 7
    (wait,) = found["atlas_lm.wait_seconds"].histogram.data_points
    assert (list(wait.explicit_bounds), list(wait.bucket_counts)) == ([0.15, 1.0], [1, 1, 1])
    assert found["gen_ai.server.time_to_first_token"].unit == "s"


def test_otlp_says_why_and_has_all_the_next_time(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    receiver.status = 400
    sender = OtlpSender(receiver.url)
    sender.take(BATCH)
    with pytest.raises(RuntimeError, match=r"(?i)400|bad request"):
        sender.push()
    assert not caplog.records, "the exporter's own lines"
    receiver.status, receiver.answer = 200, b""
    sender.push()
    sender.close()
    assert otlp_points(receiver)["atlas_lm.tokens"].sum.data_points[0].as_double == 5
    with pytest.raises(ValueError, match="'localhost'"):
        OtlpSender("localhost")
