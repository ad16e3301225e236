"""Training metrics for Prometheus, Datadog and OpenTelemetry, as Lightning loggers.

Each metric is a gauge by the name that Lightning has, with dots for slashes (an underscore in Prometheus): train/loss
is atlas_lm:train_loss there, atlas_lm.train.loss elsewhere. The only label is `model_name`.
"""

import logging
import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from atlas_lm.loggers.senders.datadog import DatadogSender
from atlas_lm.loggers.senders.delivery import Delivery
from atlas_lm.loggers.senders.metric import Metric, Sender, labelled
from atlas_lm.loggers.senders.otlp import OtlpSender
from atlas_lm.loggers.senders.prometheus import PORT, PrometheusSender

log = logging.getLogger(__name__)


def neutral_name(name: str) -> str:
    """Of a metric of Lightning's: train/loss becomes train.loss, lr-AdamW becomes lr_adamw."""
    words = [re.sub(r"[^a-z0-9_]+", "_", word) for word in name.lower().split("/") if word]
    found = ".".join(words).removesuffix("_total")  # gauges all
    return found if re.match(r"[a-z]", found) else f"metric_{found}"


def metrics_of(values: Mapping[str, float], step: int, model_name: str) -> list[Metric]:
    """What is logged at a step: a gauge each, the step, and how many of them are NaN or infinite.

    Not every backend can say NaN. A loss that is none is counted where it cannot be drawn.
    """
    labels = labelled(model_name=model_name)
    numbers = {name: float(value) for name, value in values.items()}
    broken = sum(not math.isfinite(value) for value in numbers.values())
    return [
        Metric("logging_step", "gauge", (float(step),), labels, help="Lightning's logging step; it only grows"),
        Metric(
            "nonfinite_metrics_total", "counter", (float(broken),), labels, help="metrics that were NaN or infinite"
        ),
        *(Metric(neutral_name(name), "gauge", (value,), labels, help=name) for name, value in numbers.items()),
    ]


@rank_zero_only
def _try(make: Callable[[], Sender]) -> None:
    make().close()


class SinkLogger(Logger):
    """Sends what is logged; only rank zero does. A sink that does not answer costs no step and one line in the log.

    `make` opens the sink. It is tried once now, so that what is wrong with it is said before training, and opened when
    something is logged: by then Lightning has started the process that trains. ValueError: it cannot be opened.
    """

    sink = ""

    def __init__(self, model_name: str, make: Callable[[], Sender]) -> None:
        super().__init__()
        self.model_name = model_name
        self._make = make
        self._delivery: Delivery | None = None
        self._is_lost = False
        _try(make)

    @property
    def name(self) -> str:
        """Distinguishes loggers in Lightning's messages."""
        return self.sink

    @property
    def version(self) -> str:
        """None but the run folder's."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "SinkLogger":
        """Itself: there is no other object to log to."""
        return self

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has them, and as labels each value would begin new series."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue them; the network is another thread's."""
        if self._delivery is None and not self._is_lost:
            try:
                self._delivery = Delivery(self._make())
            except ValueError as error:  # it could be opened when the run began, and the run is worth more
                self._is_lost = True
                log.warning("sink %s is lost, training is not: %s", self.sink, error)
        if self._delivery is not None:
            self._delivery.send(metrics_of(metrics, step or 0, self.model_name))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left, within seconds. What is logged later opens the sink again."""
        if self._delivery is not None:
            self._delivery.close()
            self._delivery = None


class PrometheusLogger(SinkLogger):
    """A page for a Prometheus server: see `PrometheusSender`.

    It is there from the first metrics to the end, and then for at most `linger` seconds, until it is scraped again.
    """

    sink = "prometheus"

    def __init__(self, model_name: str, port: int = PORT, host: str = "127.0.0.1", linger: float = 0.0) -> None:
        super().__init__(model_name, partial(PrometheusSender, port, host, linger))


class DatadogLogger(SinkLogger):
    """Points for Datadog: see `DatadogSender`. The key is DD_API_KEY's alone: a run folder keeps its configuration."""

    sink = "datadog"

    def __init__(self, model_name: str, host: str = "") -> None:
        super().__init__(model_name, partial(DatadogSender, host))


class OtlpLogger(SinkLogger):
    """OTLP over HTTP for an OpenTelemetry collector: see `OtlpSender`."""

    sink = "otlp"

    def __init__(self, model_name: str, endpoint: str = "") -> None:
        super().__init__(model_name, partial(OtlpSender, endpoint))
