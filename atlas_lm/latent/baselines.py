"""The rows beside a model: predictors that know the text, nothing, or what a line of arithmetic knows."""

# N windows, B batch, L frames of a history, C frames of a context, D dimensions, F frames of a document

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from atlas_lm.latent.metrics import unit

STRENGTHS = tuple(10.0**e for e in (-1, 0, 1, 2, 3, 4))  # of the ridge, on unit vectors
NEIGHBOURS = (1, 5, 10, 20, 50, 100)
LARGEST = 20_000  # training windows that kNN compares with
BLOCK = 512  # windows at a time


class Predictor(Protocol):
    """What is tested. Every prediction has unit length, or is all zeros where there is none to make."""

    reach: int
    """Frames of a history that matter to it at most."""

    def document(self, frames_FD: Tensor) -> Tensor:
        """(F, D): the prediction after each frame; before a whole context it may be anything."""
        ...

    def history(self, frames_BLD: Tensor) -> Tensor:
        """(B, D): the prediction after the last frame of each history, at least a context long."""
        ...


class WindowPredictor:
    """A predictor that sees one context, given as a function (N, C, D) → (N, D)."""

    def __init__(self, predict: Callable[[Tensor], Tensor], context: int) -> None:
        self.predict, self.context, self.reach = predict, context, context

    def history(self, frames_BLD: Tensor) -> Tensor:
        return torch.cat([self.predict(part[:, -self.context :]) for part in frames_BLD.split(BLOCK)])

    def document(self, frames_FD: Tensor) -> Tensor:
        y_ND = self.history(windows_of(frames_FD, self.context))
        return torch.cat([y_ND.new_zeros(self.context - 1, y_ND.size(1)), y_ND])


def windows_of(frames_FD: Tensor, context: int) -> Tensor:
    """(F − C + 1, C, D): every context of a document, also the last one, which nothing follows."""
    return frames_FD.unfold(0, context, 1).transpose(1, 2)


class Pairs(NamedTuple):
    """Contexts and what follows them."""

    contexts_NCD: Tensor
    targets_ND: Tensor


def pairs_of(documents: Sequence[Tensor], context: int) -> Pairs:
    """Of all documents, in order."""
    return Pairs(
        torch.cat([windows_of(frames[:-1], context) for frames in documents]),
        torch.cat([frames[context:] for frames in documents]),
    )


# Without learning


def train_mean(mean_D: Tensor, context: int) -> WindowPredictor:
    """The mean of all training frames, whatever the context."""
    return WindowPredictor(lambda x: unit(mean_D).expand(len(x), -1), context)


def last_frame(context: int) -> WindowPredictor:
    """Persistence: what was, comes again."""
    return WindowPredictor(lambda x: x[:, -1], context)


def context_mean(context: int) -> WindowPredictor:
    """The mean of the frames seen."""
    return WindowPredictor(lambda x: unit(x.mean(1)), context)


def rearranged(model: Predictor, kind: str, context: int) -> Predictor:
    """The same predictor given each context `shuffled` or `reversed`."""
    generator = torch.Generator().manual_seed(0)

    def predict(x_NCD: Tensor) -> Tensor:
        if kind == "reversed":
            return model.history(x_NCD.flip(1))
        order = torch.rand(x_NCD.shape[:2], generator=generator).argsort(1)
        return model.history(x_NCD.gather(1, order[..., None].expand_as(x_NCD)))

    return WindowPredictor(predict, context)


class Oracle(WindowPredictor):
    """Knows the text: after a context that stands there, what follows; after any other, nothing but the mean."""

    def __init__(self, documents: Sequence[Tensor], mean_D: Tensor, context: int) -> None:
        pairs = pairs_of(documents, context)
        self.follows = {_key(c): y for c, y in zip(pairs.contexts_NCD, pairs.targets_ND, strict=True)}
        self.otherwise = unit(mean_D)
        super().__init__(self._answer, context)

    def _answer(self, x_NCD: Tensor) -> Tensor:
        return torch.stack([self.follows.get(_key(c), self.otherwise) for c in x_NCD])


def _key(context_CD: Tensor) -> bytes:
    return context_CD.contiguous().numpy().tobytes()


# Learned


def scalar_mix(train: Pairs, mean_D: Tensor) -> WindowPredictor:
    """One number for each frame of the context and one for the training mean, by least squares."""
    y = train.targets_ND.flatten().double()
    columns = [train.contexts_NCD[:, i] for i in range(train.contexts_NCD.size(1))]
    columns.append(mean_D.expand_as(columns[0]))
    X = torch.stack([c.flatten() for c in columns], dim=1).double()
    w = torch.linalg.solve(X.T @ X, X.T @ y).float()
    return WindowPredictor(
        lambda x: unit(torch.einsum("c,ncd->nd", w[:-1], x) + w[-1] * mean_D), train.contexts_NCD.size(1)
    )


def ridge(train: Pairs, held_out: Pairs) -> tuple[WindowPredictor, float]:
    """All numbers of a context to all of the next frame, the strength chosen by cosine on held-out windows."""
    X, Y = train.contexts_NCD.flatten(1).double(), train.targets_ND.double()
    x_mean, y_mean = X.mean(0), Y.mean(0)
    X, Y = X - x_mean, Y - y_mean
    values, vectors = torch.linalg.eigh(X.T @ X)
    projected = vectors.T @ (X.T @ Y)

    def of(strength: float) -> WindowPredictor:
        W = (vectors @ (projected / (values + strength)[:, None])).float()
        bias = (y_mean - x_mean @ W.double()).float()
        return WindowPredictor(lambda x: unit(x.flatten(1) @ W + bias), train.contexts_NCD.size(1))

    best = max(STRENGTHS, key=lambda strength: _cosine(of(strength), held_out))
    return of(best), best


def knn(train: Pairs, held_out: Pairs) -> tuple[WindowPredictor, int]:
    """The mean of what followed the nearest contexts of training; how many is chosen on held-out windows."""
    step = -(-len(train.targets_ND) // LARGEST)
    keys, values = unit(train.contexts_NCD[::step].flatten(1)), train.targets_ND[::step]

    def of(k: int) -> WindowPredictor:
        def predict(x_NCD: Tensor) -> Tensor:
            nearest = (unit(x_NCD.flatten(1)) @ keys.T).topk(min(k, len(keys)), dim=1).indices
            return unit(values[nearest].mean(1))

        return WindowPredictor(predict, train.contexts_NCD.size(1))

    few = Pairs(*(x[:: -(-len(x) // 2000)] for x in held_out))
    best = max(NEIGHBOURS, key=lambda k: _cosine(of(k), few))
    return of(best), best


def _cosine(predictor: WindowPredictor, pairs: Pairs) -> float:
    return float((predictor.history(pairs.contexts_NCD) * pairs.targets_ND).sum(-1).mean())
