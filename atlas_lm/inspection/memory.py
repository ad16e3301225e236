"""The health of fast weights while a model writes: how far they moved, how strongly they write, what they still hold.

Residuals are asked of the memory itself, by the code that answers a text: the keys of earlier tokens are its queries,
with gates under which nothing is written or forgotten.
"""

# B batch, T tokens, H heads, D head dim, M model width

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atlas_lm.inspection import metrics
from atlas_lm.inspection.capture import AT_ONCE
from atlas_lm.inspection.hooks import Handle, Rings, watch
from atlas_lm.inspection.schema import MemoryColumns
from atlas_lm.memory.chunked import scan
from atlas_lm.memory.fast_memory import FastMemory, unchanging
from atlas_lm.memory.features import Features
from atlas_lm.memory.hierarchy import Hierarchy, HierarchyState
from atlas_lm.memory.state import MemoryState, Tokens
from atlas_lm.model.atlas import AtlasLM, State
from atlas_lm.model.block import MemoryBranch

DEEP_EVERY = 4  # rows from one with residuals and ranks to the next: these cost more than all others
WINDOWS = (1, 2, 4)  # of attention: how long ago the tokens were written whose residuals are asked for


Parts = tuple[Tensor, Tensor, Tensor]


def labels_of(model: AtlasLM, layers: Sequence[int]) -> list[str]:
    """The names of the memories of these layers: the global one first, then the local ones."""
    return [f"layer {i} {name}" for i in layers for name, _, _ in _memories(model, i)]


def _memories(model: AtlasLM, i: int) -> list[tuple[str, FastMemory, Features]]:
    branch: Any = model.blocks[i].memory
    if not isinstance(branch, MemoryBranch):
        return []
    hierarchy: Any = branch.hierarchy
    found = [] if hierarchy.global_memory is None else [("global", hierarchy.global_memory, hierarchy.features)]
    local = hierarchy.features_of_local()
    return found + [(f"local {n}", memory, local) for n, memory in enumerate(hierarchy.local_memories)]


def residuals(
    memory: FastMemory, features: Features, state: MemoryState, k_HTD: Tensor, v_HTD: Tensor, lags: Sequence[int]
) -> Tensor:
    """‖M(k) − v‖ ÷ ‖v‖, the mean over heads, of tokens so long ago: (lags,), NaN beyond the tokens that are there.

    k and v (H, T, D) end with the token read last. Lag 0 is the token written last: one that is read at the weights of
    its chunk's start has not written the unfinished chunk yet.
    """
    T = k_HTD.size(1)
    pending = state.filled if memory.rule.read == "chunk" else 0
    index = [T - 1 - pending - lag for lag in lags]
    inside = [i for i in index if i >= 0]
    found = k_HTD.new_full((len(lags),), math.nan, dtype=torch.float32)
    if not inside:
        return found
    k, v = k_HTD[:, inside].unsqueeze(0), v_HTD[:, inside].unsqueeze(0)
    phi = features(k)
    x_BTM = k.new_zeros(1, len(inside), 1)
    restart = None if state.tail.restart is None else torch.zeros_like(k[..., 0], dtype=torch.bool)
    tokens = Tokens(k, phi, v, unchanging(x_BTM, k.size(1)), restart)
    answers, _ = scan(memory.rule, state, memory.weights(), k, phi, tokens)
    found[[i >= 0 for i in index]] = metrics.residual(answers[0], v[0]).mean(0).float()
    return found


class MemoryHealth:
    """Collects what passes show, and measures at intervals. Nothing of it grows but the rows of figures.

    `deep`: residuals and ranks are measured too, every fourth time.
    """

    def __init__(self, model: AtlasLM, layers: Sequence[int], deep: bool = True) -> None:
        self.model, self.deep = model, deep
        self.layers = [i for i in layers if _memories(model, i)]
        self.columns = MemoryColumns(labels=labels_of(model, self.layers))
        window = model.config.window
        self.columns.lags = [0, *(window * n for n in WINDOWS)] if self.layers else []
        rules = [memory.rule for i in self.layers for _, memory, _ in _memories(model, i)]
        chunks = [rule.chunk for rule in rules]
        # the delta rule finishes with every token
        self.columns.chunks = [1 if rule.update == "delta" else rule.chunk for rule in rules]
        self._kept = max(self.columns.lags, default=0) + max(chunks, default=0)
        # of what passes made anyway: (x, k, v) that a memory was given, and attended, remembered, gates of its fusion
        self._prompt: dict[int, tuple[list[Parts], list[Parts]]] = {i: ([], []) for i in self.layers}
        self._tokens = Rings(AT_ONCE)  # the same of each token
        self._places = {i: self._tokens.place(f"the memory of layer {i}", 6) for i in self.layers}
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # the last keys and values (H, T, D)
        self._before: dict[int, HierarchyState] = {}
        self._rows = 0

    def hooks_on_prompt(self, i: int) -> list[Handle]:
        """Handles of those on a block's memory, for passes over a prompt; none where it has none."""
        if i not in self.layers:
            return []
        given, fused = self._prompt[i]
        return self._hooks(i, given.append, fused.append)

    def hooks(self, i: int) -> list[Handle]:
        """The same for passes over single tokens."""
        if i not in self.layers:
            return []
        at = self._places[i]
        return self._hooks(
            i, lambda parts: self._tokens.put(at, *parts), lambda parts: self._tokens.put(at + 3, *parts)
        )

    def close(self) -> None:
        """The token is read. RuntimeError: a hook did not fire."""
        if self.layers:
            self._tokens.close()

    def _hooks(self, i: int, given: Callable[[Parts], None], fused: Callable[[Parts], None]) -> list[Handle]:
        block: Any = self.model.blocks[i]
        return [
            watch(block.memory.hierarchy, lambda _, x, __, k, v, *___: given((x, k, v))),
            watch(block.fusion, lambda output, *both: fused((*both, output[1]))),
        ]

    def _taken(self) -> dict[int, tuple[Parts, Parts]]:
        """By layer: x (1, T, M), k and v (H, T, D); attended, remembered and gates (T, H·D): of the tokens since the
        last call. RuntimeError: there were none."""
        found = {}
        tokens = self._tokens.take() if self._tokens.n else []
        for i, at in self._places.items():
            given, fused = self._prompt[i]
            if len(given) != len(fused) or not (given or tokens):
                raise RuntimeError(f"the hooks on the memory of layer {i} did not fire: its health would be empty")
            if given:
                x, k, v = (torch.cat(parts, dim=-2) for parts in zip(*given, strict=True))
                y = [torch.cat(parts, dim=1)[0] for parts in zip(*fused, strict=True)]
                found[i] = (x, k[0], v[0]), (y[0], y[1], y[2])
                self._prompt[i] = [], []
            else:
                x, k, v = tokens[at : at + 3]
                y = [part[:, 0] for part in tokens[at + 3 : at + 6]]
                found[i] = (
                    (x.transpose(0, 1), k[:, :, 0].transpose(0, 1), v[:, :, 0].transpose(0, 1)),
                    (y[0], y[1], y[2]),
                )
        return found

    def _last_pairs(self, i: int, k_HTD: Tensor, v_HTD: Tensor) -> tuple[Tensor, Tensor]:
        """With those before them, as far back as residuals are asked for."""
        pieces = [self._pairs[i]] if i in self._pairs else []
        k, v = (
            torch.cat(parts, dim=1)[:, -self._kept :].clone() for parts in zip(*pieces, (k_HTD, v_HTD), strict=True)
        )
        self._pairs[i] = k, v
        return k, v

    def measure(self, step: int, states: State, deep: bool | None = None) -> None:
        """A row of figures over everything since the row before. `states`: the model's after it, by block. `deep`: with
        residuals and ranks, or when it is their turn."""
        if not self.layers:
            return
        deep = self.deep and (self._rows % DEEP_EVERY == 0 if deep is None else deep)
        tokens = step - self.columns.steps[-1] if self.columns.steps else 0
        now: dict[int, Any] = {i: states[i].memory for i in self.layers}
        figures: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        residual: list[list[float]] = []
        for i, ((x_1TM, k_HTD, v_HTD), (attended, remembered, gates)) in self._taken().items():
            saturated = metrics.saturation(gates.flatten())
            ratio = metrics.output_ratio(remembered, attended)
            branch: Any = self.model.blocks[i].memory
            pairs = self._last_pairs(i, k_HTD, v_HTD) if self.deep else None
            for n, (_, memory, features) in enumerate(_memories(self.model, i)):
                state = _state_of(now[i], n, branch.hierarchy)
                former = self._before.get(i)
                before = None if former is None else _state_of(former, n, branch.hierarchy)
                row = _row(memory, state, before, x_1TM, tokens)
                row["saturated_gates"], row["output_ratio"] = saturated, ratio
                row["effective_rank"] = metrics.effective_rank(_widest(state.change)).mean() if deep else _NONE
                for name, values in figures.items():
                    values.append(row[name])
                lags = self.columns.lags
                if deep and pairs is not None:
                    residual.append(residuals(memory, features, state, *pairs, lags).tolist())
                else:
                    residual.append([math.nan] * len(lags))
        self.columns.steps.append(step)
        table = torch.stack([torch.stack([v.float() for v in figures[name]]) for name in _COLUMNS]).tolist()
        for name, values in zip(_COLUMNS, table, strict=True):
            getattr(self.columns, name).append([_finite(v) for v in values])
        self.columns.residual.append([[_finite(v) for v in row] for row in residual])
        self._before, self._rows = now, self._rows + 1


_COLUMNS = (
    "weight_norm", "relative_change", "write_strength", "half_life", "saturated_gates", "output_ratio", "radius_share",
    "effective_rank",
)  # fmt: skip
_NONE = torch.tensor(math.nan)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _state_of(state: HierarchyState, n: int, hierarchy: Hierarchy | Any) -> MemoryState:
    if hierarchy.global_memory is None:
        return state.local_memories[n]
    whole: Any = state.global_memory
    return whole if n == 0 else state.local_memories[n - 1]


def _widest(change: tuple[Tensor, ...]) -> Tensor:
    """The matrix with the most entries: (H, rows, columns)."""
    return max(change, key=lambda x: x.numel())[0]


def _row(
    memory: FastMemory, state: MemoryState, before: MemoryState | None, x_1TM: Tensor, tokens: int
) -> dict[str, Tensor]:
    """The figures of one memory: means over heads, of the whole state."""
    gates = memory.open(x_1TM)
    change = tuple(x[0] for x in state.change)
    moved = _NONE
    if before is not None and tokens:
        past = tuple(x[0] for x in before.change)
        moved = metrics.relative_change(past, change, memory.weights()).mean() / tokens
    radius = memory.rule.radius
    mean_square = torch.stack([x.float().square().mean((-2, -1)) for x in change])
    return {
        "weight_norm": metrics.weight_norm(change).mean(),
        "relative_change": moved,
        "write_strength": gates.eta.mean(),
        "half_life": metrics.half_life(gates.alpha.flatten()),
        "radius_share": mean_square.max().sqrt() / radius,
    }
