"""Datadog: points over HTTP, by its own client (API v2, submit_metrics).

That call takes counts and gauges. A histogram goes as Datadog's agent sends one: its count, and gauges of its mean, its
95th percentile and its maximum over the interval.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from atlas_lm.loggers.senders.metric import Labels, Metric, require

NAMESPACE = "atlas_lm."
POINTS = 10_000  # kept while Datadog does not answer: some 1 MB
TIMEOUT = 3.0  # seconds of a request
CALL = 1_000  # points of a request: under its 500 kB
KEPT = (408, 429)  # answers below 500 after which the same points may be taken later


class _Point(NamedTuple):
    name: str
    labels: Labels
    second: int  # Unix
    kind: Literal["count", "gauge"]
    value: float
    unit: str


class DatadogSender:
    """Sends to Datadog's site (`DD_SITE`), or to `host` as http://127.0.0.1:8080.

    The key is `DD_API_KEY`'s unless one is given. ValueError: no key, or datadog-api-client is not installed.
    """

    name = "datadog"
    interval = 10.0  # as Datadog's agent
    linger = 0.0

    def __init__(self, host: str = "", key: str = "") -> None:
        require("datadog_api_client", "datadog")
        key = key or os.environ.get("DD_API_KEY", "")
        if not key:
            raise ValueError("datadog needs a key: export DD_API_KEY=<key>")
        if host and not host.startswith(("http://", "https://")):
            raise ValueError(f"datadog's host {host!r} must begin with http:// or https://")
        import urllib3
        from datadog_api_client import ApiClient, Configuration
        from datadog_api_client.v2.api.metrics_api import MetricsApi

        configuration = Configuration(
            host=host.rstrip("/") or None, api_key={"apiKeyAuth": key}, request_timeout=(TIMEOUT, TIMEOUT),
            retry_policy=urllib3.Retry(0),  # the delivery tries again, and says so once
        )  # fmt: skip
        self._client = ApiClient(configuration)
        self._api = MetricsApi(self._client)
        self._points: list[_Point] = []
        self._batch: list[Metric] = []
        self._second = 0  # of the newest counts

    def take(self, metrics: Sequence[Metric]) -> None:
        points = [point for metric in _merged(metrics) for point in _points(metric)]
        if points:
            # of two points of a second Datadog keeps the later one: a count would be lost
            second = self._second = max(self._second + 1, *(point.second for point in points))
            points = [point._replace(second=second) if point.kind == "count" else point for point in points]
        self._points = (self._points + points)[-POINTS:]

    def push(self) -> None:
        from datadog_api_client.exceptions import ApiException
        from datadog_api_client.v2.model.metric_payload import MetricPayload

        while self._points:
            part = self._points[:CALL]
            try:
                answer = self._api.submit_metrics(body=MetricPayload(series=list(_series(part))))
            except ApiException as error:
                if error.status and 400 <= error.status < 500 and error.status not in KEPT:
                    del self._points[: len(part)]  # the same points are refused again
                raise RuntimeError(f"{error.status} {error.reason}{_remedy(error.status)}") from error
            if answer.get("errors"):
                del self._points[: len(part)]
                raise RuntimeError(", ".join(map(str, answer["errors"])))
            del self._points[: len(part)]

    def close(self) -> None:
        self._client.close()


def _remedy(status: int | None) -> str:
    return ": check DD_API_KEY and DD_SITE" if status in (401, 403) else ""


def _merged(metrics: Sequence[Metric]) -> list[Metric]:
    """One metric for each series of counters and histograms, and for each second of a gauge."""
    found: dict[tuple[Any, ...], Metric] = {}
    for metric in metrics:
        key = (metric.name, metric.labels, int(metric.time) if metric.kind == "gauge" else None)
        before = found.get(key)
        if before is not None:
            metric = Metric(**{**vars(metric), "values": before.values + metric.values})
        found[key] = metric
    return list(found.values())


def _points(metric: Metric) -> Iterator[_Point]:
    def point(suffix: str, kind: Literal["count", "gauge"], value: float, unit: str) -> _Point:
        return _Point(NAMESPACE + metric.name + suffix, metric.labels, int(metric.time), kind, value, unit)

    values = sorted(metric.finite)
    if metric.kind == "counter":
        yield point("", "count", sum(values), metric.unit)
    elif metric.kind == "gauge":
        if metric.finite:  # JSON has no NaN
            yield point("", "gauge", metric.finite[-1], metric.unit)
    elif values:
        yield point(".count", "count", len(values), "1")
        yield point(".avg", "gauge", math.fsum(values) / len(values), metric.unit)
        yield point(".95percentile", "gauge", values[math.ceil(0.95 * len(values)) - 1], metric.unit)
        yield point(".max", "gauge", values[-1], metric.unit)


def _series(points: Sequence[_Point]) -> Iterator[Any]:
    """Points of a series together, as the client's objects."""
    from datadog_api_client.v2.model.metric_intake_type import MetricIntakeType
    from datadog_api_client.v2.model.metric_point import MetricPoint
    from datadog_api_client.v2.model.metric_series import MetricSeries

    units = {"s": "second"}  # of those that Datadog knows
    kinds = {"count": MetricIntakeType.COUNT, "gauge": MetricIntakeType.GAUGE}
    grouped: dict[tuple[str, Labels], list[_Point]] = {}
    for point in points:
        grouped.setdefault((point.name, point.labels), []).append(point)
    for (name, labels), found in grouped.items():
        unit: dict[str, Any] = {"unit": units[found[0].unit]} if found[0].unit in units else {}
        yield MetricSeries(
            metric=name, type=kinds[found[0].kind], tags=[f"{key}:{value}" for key, value in labels],
            points=[MetricPoint(timestamp=point.second, value=float(point.value)) for point in found], **unit,
        )  # fmt: skip
