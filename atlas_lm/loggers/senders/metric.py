"""A named number, and a bound on how many series may come of it."""

import importlib
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[tuple[str, str], ...]

SERIES = 100  # of one metric; a backend keeps, and bills, each combination of labels as a series of its own
OTHER = "other"


@dataclass(frozen=True)
class Metric:
    """One figure, and what came of it since the last time.

    `name`: lower case with dots, as memory.weight_norm; a counter's ends in _total. `values`: increments of a counter,
    states of a gauge of which the last one counts, observations of a histogram. What is not finite cannot be added up:
    counters and histograms leave it out, and gauges keep it where the backend takes it. `unit`: as in UCUM: s, bit,
    {token}, 1. ValueError: a name that not every backend takes.
    """

    name: str
    kind: Kind
    values: tuple[float, ...]
    labels: Labels = ()
    unit: str = "1"
    help: str = ""
    buckets: tuple[float, ...] = ()  # upper ends, of a histogram
    time: float = field(default_factory=time.time)  # Unix seconds

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*", self.name):
            raise ValueError(f"metric {self.name!r} must be lower case with dots between words, as memory.weight_norm")
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.kind} {self.name!r}: names of counters, and only those, end in _total")

    @property
    def finite(self) -> tuple[float, ...]:
        """The values that can be added up."""
        return tuple(value for value in self.values if math.isfinite(value))


def labelled(**labels: str) -> Labels:
    """In the order in which every series of the metric has them."""
    return tuple((name, str(value)) for name, value in labels.items())


class Bound:
    """Keeps the series of each metric to `limit`: further label values become "other", whatever they are.

    Labels are chosen so that there are few. This holds where that choice was wrong.
    """

    def __init__(self, limit: int = SERIES) -> None:
        self.limit = limit
        self._seen: dict[str, set[Labels]] = {}

    def __call__(self, metrics: Iterable[Metric]) -> list[Metric]:
        bounded = []
        for metric in metrics:
            seen = self._seen.setdefault(metric.name, set())
            if metric.labels not in seen and len(seen) >= self.limit:
                metric = replace(metric, labels=tuple((name, OTHER) for name, _ in metric.labels))
            else:
                seen.add(metric.labels)
            bounded.append(metric)
        return bounded


class Sender(Protocol):
    """One backend. Both methods are called from one thread, and neither is called at the same time as the other."""

    name: str
    """As the user names it."""
    interval: float
    """Seconds that lie at least between two pushes."""
    linger: float
    """Seconds for which `close` may wait until what was taken is read."""

    def take(self, metrics: Sequence[Metric]) -> None:
        """Keep them for the next push, in bounded memory."""

    def push(self) -> None:
        """Deliver what was taken. Any exception: it was not, and another push may."""

    def close(self) -> None:
        """Let go of ports and connections."""


def require(module: str, extra: str) -> None:
    """ValueError with the command that installs it, where a package is missing."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{extra} needs {module}: pip install 'atlas-lm[{extra}]'") from None
