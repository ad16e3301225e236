"""The rows of a table: models of runs, and beside them what knows the text, nothing, or a line of arithmetic."""

# F frames, D dimensions

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atlas_lm.latent import baselines
from atlas_lm.latent.baselines import Oracle, Predictor, pairs_of
from atlas_lm.latent.five_cat import Gate, Measured, Sets, centre_of, gates, measure, passed_by_test
from atlas_lm.latent.source import EmbeddingSource

Tick = Callable[[str], None]
# of the last frame and of ridge a model has to be better on both, see `verdict`
BEATEN, MEASURES = ("last frame", "ridge"), ("accuracy", "recall_at_5")
RANK = 0.5  # of the data's effective rank, that a model's predictions should have at least


@dataclass
class Row:
    """One predictor, tested."""

    name: str
    held_out: Measured
    other: Measured | None
    gates: list[Gate]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> dict[str, bool]:
        """By test of 5CAT."""
        return passed_by_test(self.gates)


@dataclass
class Bench:
    """The text that predictors are fitted to and tested on. `split`: of the documents that they are tested on."""

    source: EmbeddingSource
    split: str = "test"
    samples: int = 5000

    def __post_init__(self) -> None:
        self.context = self.source.context
        self.train, self.tuning = self.source.documents("train"), self.source.documents("validation")
        self.held_out, self.other = self.source.documents(self.split), self.source.documents("out-of-domain")
        if not self.held_out:
            raise ValueError(
                f"split={self.split}: no document of {self.source.path!r} is in it: use split=validation, or raise "
                "test_fraction when you embed"
            )
        self.mean_D: Tensor = torch.cat(self.train).mean(0)

    def test(self, name: str, predictor: Predictor, **notes: Any) -> Row:
        """All five tests, on held-out text and out of domain."""
        centre = centre_of(predictor, self.train, self.context)
        held_out, other = (
            measure(predictor, Sets(part, self.mean_D, self.context, self.samples), centre) if part else None
            for part in (self.held_out, self.other)
        )
        assert held_out is not None
        return Row(name, held_out, other, gates(held_out, other, self.context), notes)

    def baselines(self, tick: Tick = lambda name: None) -> list[Row]:
        """Oracle, mean, last frame, mean of the context, scalar mix, ridge and kNN, these tuned on validation text."""
        C, found = self.context, []
        fitted, tuning = pairs_of(self.train, C), pairs_of(self.tuning, C)

        def add(name: str, predictor: Predictor, **notes: Any) -> None:
            found.append(self.test(name, predictor, **notes))
            tick(name)

        add("oracle", Oracle([*self.train, *self.held_out, *self.other], self.mean_D, C))
        add("train mean", baselines.train_mean(self.mean_D, C))
        add("last frame", baselines.last_frame(C))
        add("context mean", baselines.context_mean(C))
        add("scalar mix", baselines.scalar_mix(fitted, self.mean_D))
        best, strength = baselines.ridge(fitted, tuning)
        add("ridge", best, strength=strength)
        nearest, k = baselines.knn(fitted, tuning)
        add("kNN", nearest, neighbours=k)
        return found

    def model(self, name: str, predictor: Predictor, tick: Tick = lambda name: None) -> list[Row]:
        """A model, and the same with each context shuffled and reversed; with a memory also with a context alone."""
        found = [self.test(name, predictor)]
        tick(name)
        for kind in ("shuffled", "reversed"):
            found.append(self.test(f"{name}, {kind} context", baselines.rearranged(predictor, kind, self.context)))
            tick(found[-1].name)
        if predictor.reach > self.context:
            alone = baselines.WindowPredictor(predictor.history, self.context)
            found.append(self.test(f"{name}, context alone", alone))
            tick(found[-1].name)
        return found


def verdict(row: Row, beaten: Sequence[Row], interval: Callable[[Tensor], Any]) -> tuple[bool, list[str]]:
    """Whether a model is better than the last frame and ridge in retrieval, and does not collapse; the reasons.

    `interval`: of values (documents, predictions), NaN where there is none, as `evaluation.bootstrap.interval`.
    """
    words, holds = [], True
    for other in beaten:
        for measure_name in MEASURES:
            found = interval(difference(row.held_out, other.held_out, measure_name))
            better = found.low > 0
            holds &= better
            is_ = "better than" if better else "worse than" if found.high < 0 else "no better than"
            values = f"{found.mean:+.3f}, {found.low:+.3f} to {found.high:+.3f}"
            if math.isnan(found.low):
                is_, values = "not known to be better than", f"{found.mean:+.3f}, one document has no interval"
            words.append(f"{is_} {other.name} in {WORDS[measure_name]} ({values})")
    share = row.held_out.effective_rank / row.held_out.data_rank
    holds &= share >= RANK
    words.append(f"effective rank {share:.2f} of the data's" + ("" if share >= RANK else f", below {RANK}"))
    return holds, words


WORDS = {
    "cosine": "cosine", "accuracy": "contrastive accuracy", "recall_at_1": "R@1", "recall_at_5": "R@5",
    "recall_at_10": "R@10", "reciprocal": "MRR",
}  # fmt: skip


def by_document(values: Sequence[Tensor]) -> Tensor:
    """(documents, most predictions), NaN where a document has fewer."""
    return torch.nn.utils.rnn.pad_sequence([x.double() for x in values], batch_first=True, padding_value=torch.nan)


def difference(a: Measured, b: Measured, name: str) -> Tensor:
    """Prediction by prediction: both were tested on the same text."""
    return by_document([x - y for x, y in zip(a.by_document(name), b.by_document(name), strict=True)])
