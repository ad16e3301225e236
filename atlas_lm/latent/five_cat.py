"""The five tests of a next-vector predictor (5CAT), with the seed's thresholds.

    A  offset sweep      is the prediction nearest to the frame after the context?
    B  retrieval         does it find that frame among the others of the document?
    C  ablations         does it need the context, in its order?
    D  roll-out          does it stay near the text when it reads its own predictions?
    E  coherence bin     is it as good on other text of the same coherence?

Offsets are counted from the last frame of the context: +1 is the target, 0 the last frame seen. The frames of the
context are no candidates of B. The peak of A is taken twice: over −3 … +3 as the thresholds have it, where any
prediction of a slow text resembles the frames it was made from, and over frames that the predictor has not seen.
"""

# P predictions of a document, F its frames, K offsets, C frames of a context, L frames of a history, D dimensions

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from atlas_lm.latent.baselines import Predictor
from atlas_lm.latent.metrics import (
    RECALLS,
    centred,
    chance,
    contrastive_accuracy,
    effective_rank,
    offset_cosines,
    recall,
    retrieve,
    spread,
    unit,
)

ROLLED = 5  # steps of D
BIN = (0.45, 0.55)  # mean cosine of neighbours in the context, of E
HISTORY = 64  # frames that C and D give to a predictor that reads long histories
GRAIN = 8  # histories are cut to a multiple of so many frames, so that they run together


class Sets(NamedTuple):
    """What a predictor is tested on."""

    documents: list[Tensor]  # (F, D) each
    mean_D: Tensor  # of all training frames
    context: int
    samples: int = 5000  # windows of C and D at most


@dataclass
class Measured:
    """What was found on one set; by document where an interval resamples documents."""

    cosine: list[Tensor] = field(default_factory=list)  # (P,) each, with the target
    accuracy: list[Tensor] = field(default_factory=list)  # contrastive
    recalls: dict[int, list[Tensor]] = field(default_factory=lambda: {k: [] for k in RECALLS})
    reciprocal: list[Tensor] = field(default_factory=list)
    raw_recalls: dict[int, list[Tensor]] = field(default_factory=lambda: {k: [] for k in RECALLS})  # not centred
    chance: dict[str, float] = field(default_factory=dict)
    offsets: dict[int, float] = field(default_factory=dict)  # mean cosine
    ablations: dict[str, float] = field(default_factory=dict)  # change of the mean cosine
    rollout: float = math.nan
    binned: float = math.nan
    in_bin: int = 0
    effective_rank: float = math.nan
    data_rank: float = math.nan
    spread: float = math.nan

    def mean(self, name: str) -> float:
        """Over all predictions, of `cosine`, `accuracy`, `reciprocal`, or `recall_at_<k>`."""
        values = torch.cat(self.by_document(name))
        return float(values[~values.isnan()].double().mean())

    def by_document(self, name: str) -> list[Tensor]:
        """(P,) each."""
        if name.startswith("recall_at_"):
            return self.recalls[int(name.removeprefix("recall_at_"))]
        return {"cosine": self.cosine, "accuracy": self.accuracy, "reciprocal": self.reciprocal}[name]

    def peak(self, seen: bool, context: int) -> tuple[int, float]:
        """The offset of the largest mean cosine, and by how much that of +1 exceeds the others'. `seen`: over
        −3 … +3; else over the frames before and after the context."""
        among = range(-3, 4) if seen else [k for k in self.offsets if not -context < k <= 0]
        found = {k: self.offsets[k] for k in among if not math.isnan(self.offsets[k])}
        others = [value for k, value in found.items() if k != 1]
        margin = found[1] - max(others) if others else math.nan
        return max(found, key=lambda k: found[k]), margin


def offsets_of(context: int) -> list[int]:
    """Those of A: the context's and three frames on either side of it."""
    return list(range(-context - 2, 4))


@torch.no_grad()
def measure(predictor: Predictor, sets: Sets, centre_D: Tensor, whole: bool = True) -> Measured:
    """All five on one set. `centre_D`: of this predictor's own predictions on training text, see `centre_of`.

    `whole` False: A and B alone, and the measures of a collapse.
    """
    found, context = Measured(), sets.context
    offsets = offsets_of(context)
    sums, counts = torch.zeros(len(offsets)).double(), torch.zeros(len(offsets)).double()
    candidates, predictions, answers = [], [], []
    for frames in sets.documents:
        y_PD = predictor.document(frames)[context - 1 : -1].float()
        cosines = offset_cosines(y_PD, frames, offsets, context).double()
        sums, counts = sums + cosines.nansum(0), counts + (~cosines.isnan()).sum(0)
        found.cosine.append(cosines[:, offsets.index(1)])
        hit = retrieve(centred(y_PD, centre_D), centred(frames, sets.mean_D), context)
        raw = retrieve(y_PD, frames, context)
        found.accuracy.append(contrastive_accuracy(hit))
        found.reciprocal.append(1 / hit.rank)
        for k in RECALLS:
            found.recalls[k].append(recall(hit, k))
            found.raw_recalls[k].append(recall(raw, k))
        candidates.append(hit.candidates)
        predictions.append(len(y_PD))
        answers.append(y_PD)
    means = torch.where(counts > 0, sums / counts, math.nan).tolist()
    found.offsets = dict(zip(offsets, means, strict=True))
    found.chance = chance(candidates, predictions)
    targets = torch.cat([frames[context:] for frames in sets.documents])
    found.effective_rank, found.data_rank = effective_rank(torch.cat(answers)), effective_rank(targets)
    found.spread = spread(torch.cat(answers), targets)
    if whole:
        _bin(found, sets)
        _ablate(found, predictor, sets)
        _roll(found, predictor, sets)
    return found


def centre_of(predictor: Predictor, documents: Sequence[Tensor], context: int, most: int = 12) -> Tensor:
    """(D,): the mean of a predictor's answers on some training documents, spread over all."""
    with torch.no_grad():
        return torch.cat(
            [predictor.document(x)[context - 1 : -1].float() for x in documents[:: -(-len(documents) // most)]]
        ).mean(0)


def _bin(found: Measured, sets: Sets) -> None:
    """E, of one set."""
    chosen = []
    for frames, cosine in zip(sets.documents, found.cosine, strict=True):
        neighbours = (frames[1:] * frames[:-1]).sum(-1)
        coherence = neighbours.unfold(0, sets.context - 1, 1).mean(1)[: len(cosine)]
        chosen.append(cosine[(coherence >= BIN[0]) & (coherence <= BIN[1])])
    values = torch.cat(chosen)
    found.in_bin, found.binned = len(values), float(values.mean()) if len(values) else math.nan


class _Group(NamedTuple):
    """Windows whose histories are equally long."""

    history_BLD: Tensor
    after_BHD: Tensor  # the frames that follow
    document_B: Tensor


def _groups(sets: Sets, reach: int, after: int) -> list[_Group]:
    """Windows spread evenly over the documents, with `after` frames after each, grouped by length of history."""
    places = [
        (number, end) for number, frames in enumerate(sets.documents)
        for end in range(sets.context, len(frames) - after + 1)
    ]  # fmt: skip
    places = places[:: -(-len(places) // sets.samples)] if places else []
    by_length: dict[int, list[tuple[int, int]]] = {}
    for number, end in places:
        length = min(end, reach, HISTORY)
        length = max(sets.context, length // GRAIN * GRAIN if length > sets.context else length)
        by_length.setdefault(length, []).append((number, end))
    return [
        _Group(
            torch.stack([sets.documents[n][end - length : end] for n, end in where]),
            torch.stack([sets.documents[n][end : end + after] for n, end in where]),
            torch.tensor([n for n, _ in where]),
        )
        for length, where in by_length.items()
    ]


def _ablate(found: Measured, predictor: Predictor, sets: Sets) -> None:
    """C: the mean cosine with the context changed, less that with it as it is."""
    C, generator = sets.context, torch.Generator().manual_seed(0)
    sums: dict[str, float] = {}
    count = 0
    for group in _groups(sets, predictor.reach, 1):
        x, target = group.history_BLD, group.after_BHD[:, 0]
        past, near = x[:, :-C], x[:, -C:]
        order = torch.rand(near.shape[:2], generator=generator).argsort(1)
        changed = {
            "as it is": near,
            "shuffled": near.gather(1, order[..., None].expand_as(near)),
            "reversed": near.flip(1),
            "last frame repeated": near[:, -1:].expand_as(near),
            "of another document": near.roll(_shift(group.document_B), 0),
        }
        for name, context in changed.items():
            sums[name] = sums.get(name, 0.0) + _cosines(predictor, torch.cat([past, context], 1), target)
        for i in range(C):
            without = near.clone()
            without[:, i] = unit(sets.mean_D)
            value = _cosines(predictor, torch.cat([past, without], 1), target)
            sums["one frame left out"] = sums.get("one frame left out", 0.0) + value / C
        count += len(x)
    base = sums.pop("as it is", math.nan)
    if len(sets.documents) < 2:
        sums["of another document"] = math.nan
    found.ablations = {name: (value - base) / count for name, value in sums.items()}


def _shift(document_B: Tensor) -> int:
    """By how much to roll windows, sorted by document, so that as few as can be stay with their own."""
    return max(int(document_B.bincount().max()), 1) % max(len(document_B), 1)


def _cosines(predictor: Predictor, history_BLD: Tensor, target_BD: Tensor) -> float:
    return float((predictor.history(history_BLD).float() * target_BD).sum().double())


def _roll(found: Measured, predictor: Predictor, sets: Sets) -> None:
    """D: mean cosine of its next five frames, each predicted after those before it."""
    total, count = 0.0, 0
    for group in _groups(sets, predictor.reach, ROLLED):
        x = group.history_BLD
        for step in range(ROLLED):
            y = predictor.history(x).float()
            total += float((y * group.after_BHD[:, step]).sum().double())
            x = torch.cat([x[:, 1:], y[:, None]], dim=1)
        count += ROLLED * len(x)
    found.rollout = total / count if count else math.nan


# The seed's gates


class Gate(NamedTuple):
    """One threshold on one set."""

    test: str
    name: str
    where: str  # held-out | out-of-domain | both
    value: float
    rule: str
    passed: bool | None  # None: could not be measured


class _AtLeast(NamedTuple):
    test: str
    name: str
    limits: dict[str, float]
    value_of: Callable[[Measured, int], float]


def _limits(held_out: float, other: float) -> dict[str, float]:
    return {"held-out": held_out, "out-of-domain": other}


AT_LEAST = (
    _AtLeast("A", "cosine at +1", _limits(0.50, 0.48), lambda m, c: m.offsets[1]),
    _AtLeast("A", "margin of +1 over −3 … +3", _limits(0.12, 0.10), lambda m, c: m.peak(True, c)[1]),
    _AtLeast("B", "R@1", _limits(0.60, 0.55), lambda m, c: m.mean("recall_at_1")),
    _AtLeast("B", "R@5", _limits(0.95, 0.92), lambda m, c: m.mean("recall_at_5")),
    _AtLeast("B", "MRR", _limits(0.80, 0.75), lambda m, c: m.mean("reciprocal")),
    _AtLeast("D", f"mean cosine of {ROLLED} steps", _limits(0.45, 0.42), lambda m, c: m.rollout),
)
AT_MOST = (
    ("shuffled", -0.15), ("reversed", -0.10), ("one frame left out", -0.08), ("last frame repeated", 0.05),
    ("of another document", 0.05),
)  # fmt: skip
BIN_DIFFERENCE = 0.05


def gates(held_out: Measured, other: Measured | None, context: int) -> list[Gate]:
    """Every threshold of the seed, held-out and out of domain; `other` None: there is no such text."""
    found = []
    for where, measured in (("held-out", held_out), ("out-of-domain", other)):
        if measured is None:
            continue
        for least in AT_LEAST:
            limit, value = least.limits[where], least.value_of(measured, context)
            found.append(Gate(least.test, least.name, where, value, f"≥ {limit:+.2f}", _judge(value >= limit, value)))
        for name, limit in AT_MOST:
            value = measured.ablations.get(name, math.nan)
            found.append(Gate("C", f"{name}: change", where, value, f"≤ {limit:+.2f}", _judge(value <= limit, value)))
    value = math.nan if other is None else abs(held_out.binned - other.binned)
    rule = f"≤ {BIN_DIFFERENCE:.2f}"
    found.append(Gate("E", "difference in the bin", "both", value, rule, _judge(value <= BIN_DIFFERENCE, value)))
    return found


def _judge(holds: bool, value: float) -> bool | None:
    return None if math.isnan(value) else holds


def passed_by_test(found: Sequence[Gate]) -> dict[str, bool]:
    """By test: whether all of its gates pass. One that could not be measured does not."""
    return {test: all(gate.passed is True for gate in found if gate.test == test) for test in "ABCDE"}
