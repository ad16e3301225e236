"""OpenTelemetry: the SDK's meters, delivered as OTLP over HTTP by its own exporter.

The SDK's periodic reader would export in a thread of its own and write a line for each failure. Here the delivery asks:
it tries again, and says so once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from atlas_lm.loggers.senders.metric import Metric, require

NAMESPACE = "atlas_lm."
STANDARD = "gen_ai."  # names of OpenTelemetry's conventions for generative AI stand as they are
TIMEOUT = 3.0  # seconds of a request, its repetitions included
EXPORTER = "opentelemetry.exporter.otlp.proto.http.metric_exporter"  # its log


class _Words(logging.Filter):
    """Keeps what the exporter logs at first while this thread exports: the reason of a failure is nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.thread: int | None = None
        self.first = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self.thread:
            return True
        self.first = self.first or record.getMessage()
        return False


class OtlpSender:
    """Sends to `endpoint` (http://collector:4318), else to OTEL_EXPORTER_OTLP_ENDPOINT's, else to localhost:4318.

    All counts are totals since the sender was made: what one push lost the next one has. ValueError: the packages of
    OpenTelemetry are not installed, or the endpoint is no address.
    """

    name = "otlp"
    interval = 5.0
    linger = 0.0

    def __init__(self, endpoint: str = "") -> None:
        require("opentelemetry.sdk.metrics", "otlp")
        require("opentelemetry.exporter.otlp.proto.http.metric_exporter", "otlp")
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp's endpoint {endpoint!r} must begin with http:// or https://")
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.resources import Resource

        self._words = _Words()
        logging.getLogger(EXPORTER).addFilter(self._words)
        url = f"{endpoint.rstrip('/')}/v1/metrics" if endpoint else None
        self._exporter = OTLPMetricExporter(endpoint=url, timeout=TIMEOUT)
        self._reader = InMemoryMetricReader()
        self._provider = MeterProvider(
            [self._reader], Resource.create({"service.name": "atlas-lm"}), shutdown_on_exit=False
        )
        self._meter = self._provider.get_meter("atlas_lm")
        self._instruments: dict[str, Any] = {}

    def take(self, metrics: Sequence[Metric]) -> None:
        for metric in metrics:
            instrument, labels = self._instrument(metric), dict(metric.labels)
            if metric.kind == "counter":
                instrument.add(sum(value for value in metric.finite if value >= 0), labels)
            elif metric.kind == "histogram":
                for value in metric.finite:
                    instrument.record(value, labels)
            elif metric.values:
                instrument.set(metric.values[-1], labels)

    def _instrument(self, metric: Metric) -> Any:
        """Made when a metric comes for the first time."""
        name = metric.name.removesuffix("_total")  # the kind says so here
        name = name if name.startswith(STANDARD) else NAMESPACE + name
        if name not in self._instruments:
            if metric.kind == "histogram":
                made: Any = self._meter.create_histogram(
                    name, metric.unit, metric.help, explicit_bucket_boundaries_advisory=list(metric.buckets) or None
                )
            else:
                kinds: dict[str, Any] = {"counter": self._meter.create_counter, "gauge": self._meter.create_gauge}
                made = kinds[metric.kind](name, metric.unit, metric.help)
            self._instruments[name] = made
        return self._instruments[name]

    def push(self) -> None:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        data = self._reader.get_metrics_data()
        if data is None:
            return
        self._words.thread, self._words.first = threading.get_ident(), ""
        try:
            result = self._exporter.export(data)
        finally:
            self._words.thread = None
        if result is not MetricExportResult.SUCCESS:
            raise RuntimeError(self._words.first or "the export failed")

    def close(self) -> None:
        logging.getLogger(EXPORTER).removeFilter(self._words)
        self._exporter.shutdown()
        self._provider.shutdown()
