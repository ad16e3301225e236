"""From raw rows to scalars: logits, attention and hidden states of a few steps are reduced together, on their device.

A model's adapter (`atlas.py`, `hugging_face.py`) keeps references to what at most `AT_ONCE` steps computed anyway; then
this page reduces them in one go and they are dropped. So what is kept grows by scalars alone, and a step pays for a
small share of the calls that its metrics take. Nothing that a model computes is changed.
"""

# B batch, V vocabulary, N steps, L layers, H heads, K keys, M model width, P periods

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atlas_lm.inspection import metrics
from atlas_lm.inspection.hooks import Ring
from atlas_lm.inspection.repetition import Repetition
from atlas_lm.inspection.schema import LayerColumns, MemoryColumns, Prompt, Steps, Table

AT_ONCE = 64  # steps whose rows wait to be reduced together; with capture=sampled twice as many
LOGITS_AT_ONCE = 2**18  # numbers: a processor's cache holds them through all passes
SAMPLED_EVERY = 64  # steps from one captured step to the next with capture=sampled
TOP_K = 10
CAPTURES = ("full", "sampled", "off")
INTERRUPTED = "interrupted after {} of {} tokens"


@dataclass
class Plan:
    """How to generate, and what of it to capture."""

    tokens: int = 64
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    capture: str = "full"  # full: every step; sampled: every 64th, and loops of all; off: logits alone
    layers: tuple[int, ...] | None = None  # None: all
    forced: tuple[int, ...] | None = None  # token ids that are read in place of those that would be drawn
    stops: Callable[[], bool] = lambda: False  # asked after each token; what was written until then is reported

    def __post_init__(self) -> None:
        if self.capture not in CAPTURES:
            raise ValueError(f"capture={self.capture} is unknown: choose {', '.join(CAPTURES)}")
        if self.tokens < 1 or self.top_k < 1:
            raise ValueError(f"tokens={self.tokens} and top_k={self.top_k} must be at least 1")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} must be at least 0, top_p={self.top_p} in (0, 1]")

    @property
    def every(self) -> int:
        """Steps from one captured step to the next; 0: none is captured."""
        return {"full": 1, "sampled": SAMPLED_EVERY, "off": 0}[self.capture]

    def chosen(self, layers: int) -> list[int]:
        """The layers to capture, of so many. ValueError: one that there is not."""
        if self.layers is None:
            return list(range(layers))
        wrong = [i for i in self.layers if not 0 <= i < layers]
        if wrong or not self.layers:
            named = wrong[0] if wrong else "none"
            raise ValueError(f"layers={named}: the model has the layers 0 to {layers - 1}")
        return sorted(set(self.layers))


class Rows(NamedTuple):
    """What the captured steps since the last call computed."""

    steps: list[int]
    weights_LHNK: Tensor | None  # attention of each step's token; keys that a step does not see weigh 0
    keys_N: Tensor | None  # how many each sees
    hidden_LNM: Tensor | None
    cross_LHNK: Tensor | None = None  # a decoder's attention to its encoder


class Adapter(Protocol):
    """What a family of models gives."""

    def take(self) -> Rows:
        """The rows since the last call, which it drops. RuntimeError: a hook never fired."""
        ...


@dataclass
class Trace:
    """The columns of a report as they grow."""

    steps: Steps = field(default_factory=Steps)
    layers: LayerColumns = field(default_factory=LayerColumns)
    cross: LayerColumns = field(default_factory=LayerColumns)
    memory: MemoryColumns = field(default_factory=MemoryColumns)
    prompt: Prompt | None = None
    warnings: list[str] = field(default_factory=list)
    prompt_seconds: float = 0.0


class Recorder:
    """Takes a row of raw logits and the token drawn from it, step by step; the adapter's rows at each flush."""

    def __init__(self, adapter: Adapter, plan: Plan) -> None:
        self.adapter = adapter
        self._sampled = plan.every > 1
        self._at_once = 2 * AT_ONCE if self._sampled else AT_ONCE
        self.trace = Trace()
        self.repetition = Repetition()
        self._logits = Ring(AT_ONCE)
        self._measured: list[int] = []  # of the steps that wait, those with logits
        self._tokens: list[int | Tensor] = []
        self._last_hidden = Ring(AT_ONCE)  # of the last layer
        self._heads = _HeadMeans(), _HeadMeans()
        self._seconds: list[tuple[float, float]] = []  # of the step, and of the pass in it
        self._capturing = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What runs inside counts as the cost of capture."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._capturing += time.perf_counter() - start

    def step(
        self, logits_1V: Tensor | None, token: int | Tensor, hidden_1M: Tensor | None, latency: float, forward: float
    ) -> bool:
        """A finished step: raw logits, the token that was drawn from them, the last layer's hidden state before them,
        and seconds. Logits of None are not captured. True: the rows were reduced now."""
        if logits_1V is not None:
            self._measured.append(len(self._tokens))
            self._logits.append(logits_1V)
        self._tokens.append(token)
        if hidden_1M is not None and not self._sampled:
            self._last_hidden.append(hidden_1M)
        self._seconds.append((latency, forward))
        full = len(self._tokens) >= self._at_once
        if full:
            self.flush()
        return full

    def flush(self) -> None:
        """Reduce what waits."""
        n = len(self._tokens)
        if not n:
            return
        with self.timed():
            self._reduce_logits()
            self._reduce_layers(self.adapter.take())
            self.trace.steps.latency_seconds += [latency for latency, _ in self._seconds]
            self.trace.steps.forward_seconds += [forward for _, forward in self._seconds]
            self._seconds = []
        self.trace.steps.capture_seconds += [self._capturing / n] * n
        self._capturing = 0.0

    def _reduce_logits(self) -> None:
        ids = [int(token) for token in self._tokens]
        steps, n = self.trace.steps, len(ids)
        steps.token_ids += ids
        names = "entropy_bits", "perplexity", "margin", "top_k_mass", "surprisal_bits"
        columns: list[list[Any]] = [[None] * n for _ in names]
        top_probabilities: list[Any] = [[] for _ in ids]
        top_tokens: list[Any] = [[] for _ in ids]
        if self._measured:
            found = self._metrics([ids[i] for i in self._measured])
            values = torch.stack([getattr(found, name) for name in names]).tolist()
            rows = found.top_k_probabilities.tolist(), found.top_k_tokens.tolist()
            for at, i in enumerate(self._measured):
                for column, row in zip(columns, values, strict=True):
                    column[i] = row[at]
                top_probabilities[i], top_tokens[i] = rows[0][at], [str(token) for token in rows[1][at]]
        for name, column in zip(names, columns, strict=True):
            getattr(steps, name).extend(column)
        steps.top_probabilities += top_probabilities
        steps.top_tokens += top_tokens  # ids; names at the end
        hidden_NM = self._last_hidden.take() if self._last_hidden.n == n else None
        loops = self.repetition.update(ids, hidden_NM)
        steps.repetition_period += loops.period
        steps.repetition_tokens += loops.tokens
        steps.repetition_cosine += loops.cosine
        self._tokens, self._measured, self._last_hidden.n = [], [], 0

    def _metrics(self, ids: list[int]) -> metrics.LogitMetrics:
        logits_NV = self._logits.take()
        tokens_N = torch.tensor(ids, device=logits_NV.device)
        at_once = max(1, LOGITS_AT_ONCE // logits_NV.size(1))
        parts = [
            metrics.logit_metrics(some, TOP_K, tokens)
            for some, tokens in zip(logits_NV.split(at_once), tokens_N.split(at_once), strict=True)
        ]
        return metrics.LogitMetrics(*(torch.cat(some) for some in zip(*parts, strict=True)))

    def _reduce_layers(self, rows: Rows) -> None:
        if not rows.steps:
            return
        layers = self.trace.layers
        layers.steps += rows.steps
        if rows.hidden_LNM is not None:
            hidden = metrics.hidden_metrics(rows.hidden_LNM)
            layers.norm += hidden.norm.T.tolist()
            layers.nonfinite += hidden.nonfinite.T.tolist()
        both = (layers, self.trace.cross), (rows.weights_LHNK, rows.cross_LHNK), self._heads
        for columns, weights, heads in zip(*both, strict=True):
            if weights is None:
                continue
            keys = rows.keys_N if columns is layers and rows.keys_N is not None else _all_keys(weights)
            of_heads = metrics.head_metrics(weights, keys)
            over = metrics.over_heads(of_heads)
            # one transfer for all columns
            values = torch.stack([x.to(of_heads.entropy_bits.dtype) for x in over]).transpose(1, 2).tolist()
            for name, column in zip(over._fields, values, strict=True):
                getattr(columns, name).extend(column)
            heads.add(of_heads)

    def finish(self) -> Trace:
        """Everything, reduced."""
        self.flush()
        for columns, heads in zip((self.trace.layers, self.trace.cross), self._heads, strict=True):
            columns.head_entropy, columns.head_concentration = heads.means()
        self.trace.cross.steps = self.trace.layers.steps if self.trace.cross.entropy_mean else []
        return self.trace


class _HeadMeans:
    """Means over steps of every head's figures."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None
        self._steps = 0

    def add(self, found: metrics.HeadMetrics) -> None:
        sums = found.entropy_bits.sum(-1), found.concentration.sum(-1)  # (L, H)
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
        self._steps += found.entropy_bits.size(-1)

    def means(self) -> tuple[Table, Table]:
        if self._sums is None:
            return [], []
        entropy, concentration = ((total / self._steps).tolist() for total in self._sums)
        return entropy, concentration


def _all_keys(weights_LHNK: Tensor) -> Tensor:
    return torch.full((weights_LHNK.size(2),), weights_LHNK.size(3), device=weights_LHNK.device)
