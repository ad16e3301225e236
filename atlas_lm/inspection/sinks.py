"""Where reports and live figures go: sink=local,prometheus

    sinks = open_sinks("local,prometheus", Path("outputs/inspect/1"))
    try:
        while generating:
            sinks.step(model_name, Live(tokens=16, entropy_bits=[...], inter_token_latency_seconds=[...]))
        for line in sinks.report(report):
            print(line)
    finally:
        sinks.close()

`step` neither waits nor raises, whatever becomes of a sink. A sink that is down is retried, then said in the log, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_lm.config.names import nearest
from atlas_lm.inspection import schema
from atlas_lm.inspection.exported import Live, Sent, gen_ai_metrics, live_metrics, report_metrics, without_gen_ai
from atlas_lm.inspection.schema import Report
from atlas_lm.loggers.senders.datadog import DatadogSender
from atlas_lm.loggers.senders.delivery import CLOSE, Delivery
from atlas_lm.loggers.senders.metric import Sender
from atlas_lm.loggers.senders.otlp import OtlpSender
from atlas_lm.loggers.senders.prometheus import PORT, PrometheusSender

__all__ = ["LOCAL", "SINKS", "Live", "Options", "Sinks", "check_sinks", "open_sinks"]

FLUSH = 5.0  # seconds that a report waits for all sinks together
LOCAL = "local"
JSON, PAGE = "report.json", "report.html"  # in the folder of the local sink

Writer = Callable[[Report, Path], object]


@dataclass(frozen=True)
class Options:
    """Of sinks beyond their names."""

    port: int = PORT
    """Of the page for Prometheus; 0: a free one."""
    host: str = "127.0.0.1"
    """On which that page is served; 0.0.0.0 lets other machines scrape it."""
    linger: float = 0.0
    """Seconds that `close` waits until that page has been scraped with the last figures."""
    datadog: str = ""
    """http(s)://… of another server than Datadog's."""
    otlp: str = ""
    """http(s)://<collector>:4318; empty: OTEL_EXPORTER_OTLP_ENDPOINT, or this machine."""


SINKS: dict[str, Callable[[Options], Sender] | None] = {
    LOCAL: None,  # files, written by whoever reports
    "prometheus": lambda options: PrometheusSender(options.port, options.host, options.linger),
    "datadog": lambda options: DatadogSender(options.datadog),
    "otlp": lambda options: OtlpSender(options.otlp),
}


def check_sinks(names: str) -> list[str]:
    """The names in sink=a,b, each once. ValueError: there is no such sink, or none is named."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    there = ", ".join(SINKS)
    if not found:
        raise ValueError(f"sink={names} names no sink: there are {there}")
    for name in found:
        if name not in SINKS:
            raise ValueError(f"sink={name} is unknown{nearest(name, SINKS)}: there are {there}")
    return found


def open_sinks(names: str, out: Path, html: Writer | None = None, **options: Any) -> Sinks:
    """Sinks by their names, with commas between them: `local`, `prometheus`, `datadog`, `otlp`.

    `out`: folder of the local sink, made when there is a report. `html`: writes a report's page to the path it is
    given. `options`: those of `Options`. ValueError, one line: an unknown sink, a package that is not installed (with
    the command that installs it), a port in use, no key for Datadog. Nothing is open then.
    """
    return Sinks(check_sinks(names), out, html, Options(**options))


class Sinks:
    """All sinks of a command. One generation at a time: `step` as often as there is news, then `report`."""

    def __init__(self, names: list[str], out: Path, html: Writer | None = None, options: Options | None = None) -> None:
        self.names, self.out, self.html = names, out, html
        self._sent = Sent()
        self._deliveries: dict[str, Delivery] = {}
        try:
            for name in names:
                make = SINKS[name]
                if make is not None:
                    self._deliveries[name] = Delivery(make(options or Options()))
        except BaseException:
            self.close()
            raise

    @property
    def is_live(self) -> bool:
        """Whether any of them takes what `step` has: there is no need to gather it otherwise."""
        return bool(self._deliveries)

    def step(self, model_name: str, live: Live) -> None:
        """Say what a generation wrote since the last call. `model_name`: as in the report that follows."""
        self._sent.add(live)
        metrics = live_metrics(model_name, live)
        for name, delivery in self._deliveries.items():
            delivery.send(without_gen_ai(metrics) if name == "otlp" else metrics)

    def report(self, report: Report) -> list[str]:
        """Deliver a report: what was not said live, and the files of the local sink. A line for each sink.

        Waits at most FLUSH seconds for sinks that do not answer. OSError: the files cannot be written.
        """
        metrics = report_metrics(report, self._sent)
        self._sent = Sent()
        for name, delivery in self._deliveries.items():
            delivery.send([*gen_ai_metrics(report), *without_gen_ai(metrics)] if name == "otlp" else metrics)
        lines = {LOCAL: self._write(report)} if LOCAL in self.names else {}
        until = time.monotonic() + FLUSH
        for name, delivery in self._deliveries.items():
            failed = delivery.flush(max(0.0, until - time.monotonic()))
            lines[name] = f"not delivered ({failed})" if failed else _where(delivery.sender)
        return [f"{name}: {lines[name]}" for name in self.names]

    def _write(self, report: Report) -> str:
        self.out.mkdir(parents=True, exist_ok=True)
        schema.write(report, self.out / JSON)
        if self.html is None:
            return f"wrote {self.out / JSON}"
        self.html(report, self.out / PAGE)
        return f"wrote {self.out / JSON} and {PAGE}"

    def close(self) -> None:
        """End all of them, within seconds and `linger`. Once; `step` and `report` may not follow."""
        for delivery in self._deliveries.values():
            delivery.stop()
        until = time.monotonic() + CLOSE
        for delivery in self._deliveries.values():
            delivery.close(max(0.0, until - time.monotonic()))
        self._deliveries = {}


def _where(sender: Sender) -> str:
    if isinstance(sender, PrometheusSender):
        later = f"waiting {sender.linger:g} s for it" if sender.linger else "linger=60 waits for it"
        often = f"scraped {sender.scrapes} times" if sender.scrapes else f"not scraped so far: {later}"
        return f"{sender.url}, {often}"
    return "delivered"
