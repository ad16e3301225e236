"""Reports and live figures in sinks: every figure once, few series, and no sink that is down is in the way."""

import logging
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from atlas_lm.inspection import schema
from atlas_lm.inspection.exported import MEMORY, Live, Sent, gen_ai_metrics, live_metrics, report_metrics
from atlas_lm.inspection.sinks import Sinks, check_sinks, open_sinks
from atlas_lm.loggers.senders.prometheus import PrometheusSender
from tests.support.receivers import black_hole, free_port, receiving
from tests.support.reports import a_report

MODEL = 'model_name="tiny"'


def scraped(sinks: Sinks) -> dict[str, float]:
    """Series and values of the page, without the times at which they began."""
    sender = sinks._deliveries["prometheus"].sender
    assert isinstance(sender, PrometheusSender)
    with urllib.request.urlopen(sender.url, timeout=5) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    pairs = (line.rpartition(" ") for line in lines if "_created" not in line)
    return {name: float(value) for name, _, value in pairs}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Sinks]:
    pytest.importorskip("prometheus_client")
    sinks = open_sinks("prometheus", tmp_path, port=0)
    yield sinks
    sinks.close()


# Names


@pytest.mark.parametrize(
    ("names", "words"),
    [("locl", "did you mean 'local'"), ("local,kafka", "sink=kafka"), ("", "names no"), (",", "local")],
)
def test_an_unknown_sink_is_named(names: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_sinks(names, tmp_path)
    assert "local, prometheus, datadog, otlp" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_come_once() -> None:
    assert check_sinks("local, prometheus,local") == ["local", "prometheus"]


@pytest.mark.parametrize(
    ("sink", "package"),
    [("prometheus", "prometheus_client"), ("datadog", "datadog_api_client"), ("otlp", "opentelemetry.sdk.metrics")],
)
def test_a_missing_package_is_named(sink: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=re.escape(f"pip install 'atlas-lm[{sink}]'")):
        open_sinks(sink, tmp_path)


def test_what_was_open_is_closed_where_another_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    pytest.importorskip("datadog_api_client")
    monkeypatch.delenv("DD_API_KEY", raising=False)
    port = free_port()
    with pytest.raises(ValueError, match="DD_API_KEY"):
        open_sinks("prometheus,datadog", tmp_path, port=port)
    open_sinks("prometheus", tmp_path, port=port).close()


# Files


def test_the_local_sink_writes_what_reads_back(tmp_path: Path) -> None:
    sinks = open_sinks("local", tmp_path / "new" / "folder", lambda report, path: path.write_text(report.id))
    sinks.step("tiny", Live(4))
    (line,) = sinks.report(a_report())
    sinks.close()
    assert str(tmp_path / "new" / "folder" / "report.json") in line
    assert schema.read(tmp_path / "new" / "folder" / "report.json") == a_report()
    assert (tmp_path / "new" / "folder" / "report.html").read_text() == "tiny-0001"


# Figures


def test_a_report_is_exported(prometheus: Sinks) -> None:
    assert "http://127.0.0.1" in prometheus.report(a_report())[0]
    found = scraped(prometheus)
    expected = {
        "prompt_tokens_total": 3, "generation_tokens_total": 4, "reports_total": 1, "token_entropy_bits_count": 4,
        "token_entropy_bits_sum": 14, "token_surprisal_bits_sum": 10, "inter_token_latency_seconds_count": 3,
        "time_to_first_token_seconds_sum": 0.02, "e2e_request_latency_seconds_sum": 0.05,
    }  # fmt: skip
    for name, value in expected.items():
        assert found[f"atlas_lm:{name}{{{MODEL}}}"] == pytest.approx(value), name
    assert found[f'atlas_lm:health_flags_total{{flag="high_entropy",{MODEL}}}'] == 1
    assert found[f'atlas_lm:health_flags_total{{flag="nonfinite",{MODEL}}}'] == 0
    last = {
        "weight_norm": 1.5, "relative_change": 0.1, "write_strength": 0.6, "half_life": 800, "saturated_gates": 0.1,
        "output_ratio": 0.5, "radius_share": 0.02, "effective_rank": 4, "residual": 0.3,
    }  # fmt: skip
    assert set(last) == set(MEMORY)
    for name, value in last.items():
        assert found[f'atlas_lm:memory_{name}{{memory="layer 1 global",{MODEL}}}'] == value, name
    assert found[f'atlas_lm:layer_norm{{layer="0",{MODEL}}}'] == 6


def test_what_was_said_live_is_not_counted_again(prometheus: Sinks) -> None:
    report = a_report(steps=6)
    alone = {k: v for k, v in _of(prometheus, report).items() if "_total" in k or "_bucket" in k or "_count" in k}
    entropy, wait = report.steps.entropy_bits, report.steps.latency_seconds
    for start in (0, 2):
        waits = wait[max(1, start) : start + 2]
        prometheus.step(
            "tiny", Live(2, entropy[start : start + 2], report.steps.surprisal_bits[start : start + 2], waits)
        )
    both = _of(prometheus, report)
    assert {name: both[name] for name in alone} == {name: 2 * value for name, value in alone.items()}


@pytest.mark.parametrize("leaves_out", [False, True])
def test_steps_without_a_figure_shift_nothing(prometheus: Sinks, leaves_out: bool) -> None:
    """NaN is None in a report; a caller may hand it on or leave it out."""
    report = a_report(steps=6)
    report.steps.entropy_bits[1] = None
    live = [x for x in report.steps.entropy_bits[:4] if x is not None or not leaves_out]
    prometheus.step("tiny", Live(4, live))
    found = _of(prometheus, report)
    assert found[f"atlas_lm:token_entropy_bits_count{{{MODEL}}}"] == 5
    assert found[f"atlas_lm:token_entropy_bits_sum{{{MODEL}}}"] == sum(
        x for x in report.steps.entropy_bits if x is not None
    )


def _of(sinks: Sinks, report: schema.Report) -> dict[str, float]:
    sinks.report(report)
    return scraped(sinks)


def test_live_figures_are_there_before_the_report(prometheus: Sinks) -> None:
    memory = {"layer 1 global": {"weight_norm": 2.5, "half_life": None}}
    prometheus.step("tiny", Live(16, [1.0, None, 3.0], (), [0.01], memory))
    assert prometheus._deliveries["prometheus"].flush(5) == ""
    found = scraped(prometheus)
    assert found[f"atlas_lm:generation_tokens_total{{{MODEL}}}"] == 16
    assert found[f"atlas_lm:token_entropy_bits_count{{{MODEL}}}"] == 2
    assert found[f'atlas_lm:memory_weight_norm{{memory="layer 1 global",{MODEL}}}'] == 2.5
    assert not any("half_life" in name for name in found)


def test_an_empty_report_is_exported(prometheus: Sinks) -> None:
    """capture=off on a model without a memory."""
    report = a_report(steps=0).model_copy(
        update={"memory": schema.MemoryColumns(), "layers": schema.LayerColumns(), "latency": schema.Latency()}
    )
    prometheus.report(report)
    assert scraped(prometheus)[f"atlas_lm:generation_tokens_total{{{MODEL}}}"] == 0


def test_a_thousand_reports_make_no_more_series_than_one(prometheus: Sinks) -> None:
    first = len(_of(prometheus, a_report()))
    for i in range(1000):
        report = a_report().model_copy(update={"id": f"trace-{i}", "text": f"text {i}", "created": f"{i}"})
        report.prompt.text = f"prompt {i}"
        for delivery in prometheus._deliveries.values():
            delivery.send(report_metrics(report, Sent()))
        if i % 100 == 0:
            prometheus.step("tiny", Live(1, [0.1 * i]))
    prometheus._deliveries["prometheus"].flush(30)
    found = scraped(prometheus)
    assert len(found) == first
    assert not re.search(r"trace-|prompt \d|text \d", "".join(found))
    assert {word for name in found for word in re.findall(r"(\w+)=\"", name)} == {
        "model_name", "flag", "memory", "layer", "operation", "le",
    }  # fmt: skip


def test_a_thousand_names_of_models_are_bounded(prometheus: Sinks) -> None:
    """A caller that puts an id where a name belongs."""
    for i in range(1000):
        prometheus._deliveries["prometheus"].send(report_metrics(a_report(f"model {i}"), Sent()))
    prometheus._deliveries["prometheus"].flush(60)
    names = {found for name in scraped(prometheus) for found in re.findall(r'model_name="([^"]+)"', name)}
    assert "other" in names
    assert len(names) <= 101


def test_opentelemetry_has_its_own_names() -> None:
    found = {metric.name: metric for metric in gen_ai_metrics(a_report())}
    assert set(found) == {
        "gen_ai.client.token.usage", "gen_ai.client.operation.duration", "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }  # fmt: skip
    usage = {dict(m.labels)["gen_ai.token.type"]: m.values for m in gen_ai_metrics(a_report()) if "usage" in m.name}
    assert usage == {"input": (3.0,), "output": (4.0,)}
    assert all(dict(m.labels)["gen_ai.request.model"] == "tiny" for m in found.values())


def test_opentelemetry_gets_each_figure_once(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    with receiving() as receiver:
        receiver.status, receiver.answer = 200, b""
        sinks = open_sinks("otlp", tmp_path, otlp=receiver.url)
        sinks.step("tiny", Live(2, [1.0, 2.0], (), [0.01]))
        assert sinks.report(a_report()) == ["otlp: delivered"]
        sinks.close()
        content = ExportMetricsServiceRequest.FromString(receiver.requests[-1].body)
    names = {metric.name for metric in content.resource_metrics[0].scope_metrics[0].metrics}
    assert {"gen_ai.client.token.usage", "atlas_lm.memory.weight_norm", "atlas_lm.token_entropy_bits"} <= names
    assert not {"atlas_lm.generation_tokens", "atlas_lm.time_to_first_token_seconds"} & names


# Sinks that are down


@pytest.mark.long
@pytest.mark.parametrize("answers", [False, None], ids=["nobody listens", "nothing is answered"])
def test_dead_sinks_cost_no_generation_and_no_report(
    answers: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datadog_api_client")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("DD_API_KEY", "secret")
    caplog.set_level(logging.INFO)
    with black_hole() as hole:
        url = hole if answers is None else f"http://127.0.0.1:{free_port()}"
        sinks = open_sinks("datadog,local,otlp", tmp_path, datadog=url, otlp=url)
        start = time.perf_counter()
        for _ in range(200):
            sinks.step("tiny", Live(16, [1.0] * 16, [1.0] * 16, [0.01] * 16))
        assert time.perf_counter() - start < 1
        lines = sinks.report(a_report())
        sinks.close()
        assert time.perf_counter() - start < 15
    assert schema.read(tmp_path / "report.json") == a_report()
    assert [line.partition(":")[0] for line in lines] == ["datadog", "local", "otlp"]
    assert "not delivered" in lines[0]
    assert "not delivered" in lines[2]
    assert sorted(re.findall(r"sink (\w+)", "\n".join(r.getMessage() for r in caplog.records))) == ["datadog", "otlp"]
    assert len(caplog.records) == 2


def test_a_full_disk_is_said_and_the_others_have_their_figures(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    (tmp_path / "file").write_text("in the way")
    sinks = open_sinks("local,prometheus", tmp_path / "file", port=0)
    with pytest.raises(OSError, match="file"):
        sinks.report(a_report())
    sinks._deliveries["prometheus"].flush(5)
    assert scraped(sinks)[f"atlas_lm:reports_total{{{MODEL}}}"] == 1
    sinks.close()


def test_live_metrics_without_figures_are_their_tokens() -> None:
    assert [metric.name for metric in live_metrics("m", Live(0))] == ["generation_tokens_total"]
