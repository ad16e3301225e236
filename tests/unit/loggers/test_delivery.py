"""A backend that is down costs its caller nothing but one line in the log, and gets what it missed when it is back."""

import json
import logging
import time
from collections.abc import Callable

import pytest

from atlas_lm.loggers.senders import delivery
from atlas_lm.loggers.senders.datadog import DatadogSender
from atlas_lm.loggers.senders.delivery import Delivery
from atlas_lm.loggers.senders.metric import Metric, Sender, labelled
from atlas_lm.loggers.senders.otlp import OtlpSender
from tests.support.receivers import Receiver, black_hole, free_port, receiving

MAKERS: dict[str, Callable[[str], Sender]] = {
    "datadog": lambda url: DatadogSender(url, "secret"),
    "otlp": OtlpSender,
}
EXTRAS = {"datadog": "datadog_api_client", "otlp": "opentelemetry.exporter.otlp.proto.http"}


def tokens(count: float = 1.0, trace: str = "m") -> list[Metric]:
    return [Metric("tokens_total", "counter", (count,), labelled(model_name=trace))]


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def counted(receiver: Receiver) -> float:
    """Tokens of all requests to a Datadog that took them."""
    series = [s for request in receiver.requests for s in json.loads(request.body)["series"]]
    return sum(point["value"] for s in series for point in s["points"])


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[str], Sender]:
    pytest.importorskip(EXTRAS[request.param])
    return MAKERS[request.param]


@pytest.mark.long
@pytest.mark.parametrize("answers", [False, None], ids=["nobody listens", "nothing is answered"])
def test_a_dead_sink_costs_one_line(
    make: Callable[[str], Sender], answers: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "atlas_lm")
    with black_hole() as hole:
        url = hole if answers is None else f"http://127.0.0.1:{free_port()}"
        sink = Delivery(make(url), first_pause=0.01)
        assert seconds_of(lambda: [sink.send(tokens()) for _ in range(200)]) < 0.5
        assert seconds_of(lambda: sink.flush(1.0)) < 3
        for _ in range(20):
            sink.send(tokens())
        assert seconds_of(lambda: sink.close(1.0)) < 3
    (line,) = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert line.levelno == logging.WARNING
    assert f"sink {sink.sender.name} " in line.getMessage()
    assert "\n" not in line.getMessage()


def test_it_is_tried_again_before_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("datadog_api_client")
    with receiving() as receiver:
        receiver.status = 503
        sink = Delivery(DatadogSender(receiver.url, "secret"), attempts=4, first_pause=0.01)
        sink.send(tokens())
        assert "503" in sink.flush(5.0)
        assert len(receiver.requests) >= 4
        assert len(caplog.records) == 1
        sink.close()
    assert len(caplog.records) == 1


def test_nothing_is_lost_in_a_short_outage(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("datadog_api_client")
    caplog.set_level(logging.INFO, "atlas_lm")
    with receiving() as receiver:
        receiver.status = 503
        sink = Delivery(DatadogSender(receiver.url, "secret"), attempts=2, first_pause=0.05)
        for _ in range(5):
            sink.send(tokens(2.0))
        assert sink.flush(5.0)
        receiver.requests.clear()
        receiver.status = 202
        deadline = time.monotonic() + 5
        while sink.flush(0.1) and time.monotonic() < deadline:
            pass
        sink.send(tokens(1.0))
        sink.close()
        assert counted(receiver) == 11
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"], "it is down, it is back"


def test_a_push_waits_for_the_interval_and_a_flush_does_not() -> None:
    pytest.importorskip("datadog_api_client")
    with receiving() as receiver:
        sink = Delivery(DatadogSender(receiver.url, "secret"))
        sink.send(tokens())
        assert sink.flush(5.0) == ""
        sink.send(tokens())
        time.sleep(0.2)
        assert len(receiver.requests) == 1
        assert sink.flush(5.0) == ""
        assert len(receiver.requests) == 2
        sink.send(tokens())
        sink.close()
        assert counted(receiver) == 3, "what is left goes out at the end"


class Slow:
    """A sender that takes its time and counts what it is given."""

    name, interval, linger = "slow", 0.0, 0.0

    def __init__(self) -> None:
        self.batches: list[int] = []

    def take(self, metrics: list[Metric]) -> None:
        self.batches.append(len(metrics))

    def push(self) -> None:
        time.sleep(0.2)

    def close(self) -> None:
        pass


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "QUEUE", 10)
    sender = Slow()
    sink = Delivery(sender)
    for _ in range(1000):
        sink.send(tokens())
    assert sink.flush(5.0) == ""
    sink.close()
    assert sum(sender.batches) <= 10 + sender.batches[0]
    assert sender.batches[-1] <= 10


def test_series_are_bounded_on_the_way() -> None:
    sender = Slow()
    seen: set[object] = set()
    sender.take = lambda metrics: seen.update(m.labels for m in metrics)  # type: ignore[method-assign]
    sink = Delivery(sender)
    for i in range(500):
        sink.send(tokens(trace=str(i)))
    sink.flush(5.0)
    sink.close()
    assert 100 <= len(seen) <= 101
