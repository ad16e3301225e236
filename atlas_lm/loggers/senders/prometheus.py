"""Prometheus: an HTTP page that a server scrapes. Names as vLLM's: one prefix, seconds, counters end in _total."""

from __future__ import annotations

import errno
import logging
import re
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from atlas_lm.loggers.senders.metric import Metric, require

log = logging.getLogger(__name__)

PREFIX = "atlas_lm:"
PORT = 9464  # of OpenTelemetry's exporter for Prometheus
POLL = 0.05  # seconds


def exported_name(name: str) -> str:
    """Of a metric, on the page."""
    return PREFIX + re.sub(r"\W", "_", name)


class _Page(ThreadingHTTPServer):
    """The registry's figures as text, whatever format is asked for: as OpenMetrics the client writes the colon of our
    names as an underscore, and Prometheus would store other names than people find on the page."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], registry: Any) -> None:
        self.registry = registry
        self.scrapes = 0
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A server that did not wait for the page scrapes again: no traceback for that."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log.warning("the page for Prometheus failed: %s: %s", type(error).__name__, error)


class _Handler(BaseHTTPRequestHandler):
    server: _Page

    def do_GET(self) -> None:
        import prometheus_client

        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        body = prometheus_client.generate_latest(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.scrapes += 1

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a line for each scrape."""


class PrometheusSender:
    """Serves http://<host>:<port>/metrics; port 0 takes a free one.

    Whoever scrapes comes at their own time: `linger` seconds is how long `close` waits for them to read the last state.
    ValueError: prometheus_client is not installed, or the port cannot be had.
    """

    name = "prometheus"
    interval = 0.0

    def __init__(self, port: int = PORT, host: str = "127.0.0.1", linger: float = 0.0) -> None:
        require("prometheus_client", "prometheus")
        import prometheus_client

        if not 0 <= port <= 65535:
            raise ValueError(f"port {port} of prometheus must be 0 to 65535")
        self.linger = linger
        prometheus_client.disable_created_metrics()  # a gauge beside each counter that nobody asks for
        self._registry = prometheus_client.CollectorRegistry()
        self._figures: dict[str, Any] = {}
        self._changed_at_scrape = 0
        try:
            self._server = _Page((host, port), self._registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} of prometheus is in use: give another one, or end who has it") from error
            raise ValueError(f"prometheus cannot listen on {host}:{port} ({error.strerror}): give another") from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL,), daemon=True)
        self._thread.start()
        self.port = self._server.server_port
        self.url = f"http://{host}:{self.port}/metrics"

    @property
    def scrapes(self) -> int:
        """How often the page was read so far."""
        return self._server.scrapes

    def take(self, metrics: Sequence[Metric]) -> None:
        for metric in metrics:
            names, values = [name for name, _ in metric.labels], [value for _, value in metric.labels]
            figure = self._figure(metric, names)
            series = figure.labels(*values) if names else figure
            if metric.kind == "counter":
                series.inc(sum(value for value in metric.finite if value >= 0))
            elif metric.kind == "histogram":
                for value in metric.finite:
                    series.observe(value)
            elif metric.values:
                series.set(metric.values[-1])
        self._changed_at_scrape = self.scrapes

    def _figure(self, metric: Metric, labels: list[str]) -> Any:
        import prometheus_client as client

        name = exported_name(metric.name)
        if name not in self._figures:
            settings: dict[str, Any] = {"registry": self._registry}
            if metric.kind == "histogram" and metric.buckets:
                settings["buckets"] = metric.buckets
            kind = {"counter": client.Counter, "gauge": client.Gauge, "histogram": client.Histogram}[metric.kind]
            self._figures[name] = kind(name, metric.help or metric.name, labels, **settings)
        return self._figures[name]

    def push(self) -> None:
        """Nothing: it is scraped."""

    def close(self) -> None:
        until = time.monotonic() + self.linger
        while self.scrapes == self._changed_at_scrape and self._figures and time.monotonic() < until:
            time.sleep(POLL)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
