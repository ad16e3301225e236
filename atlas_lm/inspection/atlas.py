"""Our own models under inspection: prompt, then token by token, with the health of every memory.

Hooks stand on what a block computes anyway: its hidden state, the queries and keys of its attention, what goes into and
comes out of its memories. Weights of attention, which the fused kernels never hold, are computed from those again.
"""

# B batch, T tokens, H heads, D head dim, K keys, W window, L layers, M model width

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.inspection import metrics
from atlas_lm.inspection.capture import INTERRUPTED, Plan, Recorder, Rows, Trace
from atlas_lm.inspection.memory import MemoryHealth
from atlas_lm.inspection.schema import Prompt
from atlas_lm.inspection.window import PromptSums, window_weights
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.attention import AttentionState
from atlas_lm.model.block import MemoryBranch
from atlas_lm.model.sampling import draw
from atlas_lm.model.session import Session

SAMPLED_ROWS = 128  # steps at least from one row of the memories' health to the next with capture=sampled


class _Call(NamedTuple):
    """What one forward pass of a block left."""

    hidden_TM: Tensor
    qkv_TC: Tensor
    attention: AttentionState | None  # before the pass; None where the call before leads to it


class _Row(NamedTuple):
    """Of all captured layers."""

    weights_LHtK: Tensor
    seen_t: Tensor
    hidden_LtM: Tensor


class AtlasCapture:
    """Hooks on an AtlasLM: attached for the passes that are captured, so that the others cost nothing."""

    def __init__(self, model: AtlasLM, plan: Plan) -> None:
        self.model = model
        self.chosen = plan.chosen(len(model.blocks)) if plan.every else []
        self.continuous = plan.every == 1
        self.memory = MemoryHealth(model, self.chosen, deep=self.continuous)
        self._handles: list[Any] = []
        self._qkv: dict[int, Tensor] = {}
        self._calls: dict[int, list[_Call]] = {i: [] for i in self.chosen}
        self._steps: list[int] = []
        self._unmeasured: int | None = None
        self._first: _Row | None = None  # of step 0: the last token of the prompt
        self._joins = False  # passes follow each other and become one row

    def measure_memory(self, last: bool = False) -> None:
        """A row of the memories' health, at the step captured last, where it is time for one. `last`: it is the end.

        Only where every token is seen are there residuals and ranks of what was written; they cost most.
        """
        rows = self.memory.columns.steps
        if self._unmeasured is None or (
            not last and not self.continuous and rows and self._unmeasured - rows[-1] < SAMPLED_ROWS
        ):
            return
        self.memory.measure(self._unmeasured, True if last else None)
        self._unmeasured = None

    def attach(self) -> None:
        """From here on passes are captured."""
        if self._handles:
            return
        for i in self.chosen:
            block: Any = self.model.blocks[i]
            source = block.attention.qkv if block.attention.conv is None else block.attention.conv
            self._handles += [
                source.register_forward_hook(self._keep_qkv(i)),
                block.register_forward_hook(self._keep_call(i)),
            ]
            if isinstance(block.memory, MemoryBranch):
                self._handles += self.memory.hooks(i)

    def detach(self) -> None:
        """From here on they are not."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep_qkv(self, i: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            self._qkv[i] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    def _keep_call(self, i: int) -> Callable[..., None]:
        def hook(_: Any, arguments: Any, output: Any) -> None:
            qkv = self._qkv.pop(i, None)
            if qkv is None:
                raise RuntimeError(f"the hook on the attention of layer {i} did not fire: its metrics would be empty")
            calls = self._calls[i]
            # a state is a window of keys and values: kept for every token they push the model's own out of the caches
            follows = self._joins and bool(calls)
            calls.append(_Call(output[0][0], qkv, None if follows else arguments[1].attention))
            self.memory.after(i, output[2].memory)

        return hook

    def captured(self, step: int) -> None:
        """The pass just made belongs to this step."""
        self._steps.append(step)
        if step:  # the state of step 0 is measured after the prompt
            self._unmeasured = step

    def take(self) -> Rows:
        """See `Adapter`."""
        steps, self._steps = self._steps, []
        if not steps:
            return Rows([], None, None, None)
        first, self._first = self._first, None
        rows = [] if first is None else [first]
        by_layer = self._taken(len(steps) - len(rows))
        if by_layer and self._joins:
            by_layer = [[_joined(calls)] for calls in by_layer]
        rows += [row for calls in zip(*by_layer, strict=True) for row in self._rows(calls)]
        widest = max(row.weights_LHtK.size(3) for row in rows)
        padded = [nnf.pad(row.weights_LHtK, (widest - row.weights_LHtK.size(3), 0)) for row in rows]
        seen, hidden = torch.cat([row.seen_t for row in rows]), torch.cat([row.hidden_LtM for row in rows], dim=1)
        return Rows(steps, torch.cat(padded, dim=2), seen, hidden)

    def _taken(self, times: int) -> list[list[_Call]]:
        """The calls of each layer, which are dropped; none where there were none. RuntimeError: not so many."""
        by_layer = []
        for i in self.chosen:
            calls, self._calls[i] = self._calls[i], []
            if len(calls) != times:
                raise RuntimeError(f"the hook on layer {i} fired {len(calls)} times in {times} passes")
            by_layer.append(calls)
        return by_layer if times else []

    def _rows(self, calls: Sequence[_Call]) -> list[_Row]:
        """Of one pass: a call for each layer."""
        attention: Any = self.model.blocks[self.chosen[0]].attention
        qkv, hidden = torch.stack([call.qkv_TC for call in calls]), torch.stack([call.hidden_TM for call in calls])
        pieces = window_weights(qkv, _states(calls), attention.heads, attention.window)
        parts = hidden.split([piece.size(2) for piece, _, _ in pieces], dim=1)
        return [_Row(piece, seen, states) for (piece, seen, _), states in zip(pieces, parts, strict=True)]

    def prompt(self, text: str, names: list[str], ids_T: Tensor, logits_TV: Tensor) -> Prompt:
        """What the passes over the prompt, just made, computed. Its last token is the row of step 0."""
        found = Prompt(text=text, tokens=names, surprisal_bits=_surprisals(logits_TV, ids_T))
        attention: Any = self.model.blocks[self.chosen[0]].attention
        passes = max(len(self._calls[i]) for i in self.chosen)
        by_layer = self._taken(max(1, passes))
        sums, start = PromptSums(ids_T.numel()), _states(by_layer[0])[0].position
        for calls in zip(*by_layer, strict=True):
            qkv = torch.stack([call.qkv_TC for call in calls])
            pieces = window_weights(qkv, _states(calls), attention.heads, attention.window)
            for weights, seen, first in pieces:
                sums.add(weights, seen, first - start)
        sums.into(found, attention.window)
        hidden_LTM = torch.stack([torch.cat([call.hidden_TM for call in calls]) for calls in by_layer])
        last = weights[:, :, -1:, -attention.window :].clone()
        self._first = _Row(last, seen[-1:], hidden_LTM[:, -1:].clone())
        states = metrics.hidden_metrics(hidden_LTM)
        found.norm, found.nonfinite = states.norm.mean(-1).tolist(), states.nonfinite.sum(-1).tolist()
        found.transformation = metrics.transformation(hidden_LTM[:-1], hidden_LTM[1:]).tolist()
        self._joins = self.continuous
        return found


def _states(calls: Sequence[_Call]) -> list[AttentionState]:
    return [call.attention for call in calls if call.attention is not None]


def _joined(calls: list[_Call]) -> _Call:
    """Passes that follow each other, as one."""
    qkv, hidden = torch.cat([call.qkv_TC for call in calls]), torch.cat([call.hidden_TM for call in calls])
    return _Call(hidden, qkv, calls[0].attention)


def _surprisals(logits_TV: Tensor, ids_T: Tensor) -> list[float | None]:
    """Of every token but the first."""
    return metrics.surprisal_bits(logits_TV[:-1], ids_T[1:]).tolist() if ids_T.numel() > 1 else []


@torch.inference_mode()
def inspect(
    model: AtlasLM,
    ids: Sequence[int],
    plan: Plan,
    names: Callable[[Sequence[int]], list[str]],
    text: str = "",
    session: Session | None = None,
    on_flush: Callable[[Trace], None] = lambda _: None,
) -> Trace:
    """Read a prompt and continue it as `generate_tokens` does, token for token, with everything that `plan` captures.

    `names`: the text of token ids. `session`: one that has read something, and reads on. `on_flush` is called whenever
    rows were reduced. Where the logits are not finite no token can be drawn: it ends there, with a warning.
    ValueError: an empty prompt.
    """
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    device = model.embed.weight.device
    session = model.stream() if session is None else session
    capture = AtlasCapture(model, plan)
    recorder = Recorder(capture)
    recorder.trace.memory = capture.memory.columns
    last: list[Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0][0, -1]))
    prompt_T = torch.tensor(list(ids), device=device)
    try:
        start, every = time.perf_counter(), plan.every
        if every:
            capture.attach()
        logits_TV = session.read(prompt_T.unsqueeze(0))[0]
        forward = recorder.trace.prompt_seconds = time.perf_counter() - start
        with recorder.timed():
            if every:
                recorder.trace.prompt = capture.prompt(text, names(ids), prompt_T, logits_TV)
                capture.memory.measure(0, deep=True)
            else:
                bits = _surprisals(logits_TV, prompt_T)
                recorder.trace.prompt = Prompt(text=text, tokens=names(ids), surprisal_bits=bits)
        del logits_TV
        generator = torch.Generator(device).manual_seed(plan.seed)
        for i in range(plan.tokens):
            logits_BV, hidden_M = session.logits, last.pop()
            assert logits_BV is not None
            last.clear()
            if every and i % every == 0:
                capture.captured(i)
            stopped: FloatingPointError | None = None
            try:
                token = draw(logits_BV, plan.temperature, plan.top_k, generator)
            except FloatingPointError as error:
                stopped, token = error, logits_BV.new_zeros(1, 1, dtype=torch.int64)
            if plan.forced is not None and i < len(plan.forced):
                token = torch.full_like(token, plan.forced[i])
            now = time.perf_counter()
            if recorder.step(logits_BV[0], token[0, 0], hidden_M, now - start, forward) and every:
                with recorder.timed():
                    capture.measure_memory()
            if stopped is not None:
                recorder.trace.warnings.append(f"stopped at step {i}: {stopped}")
                break
            if len(recorder.trace.steps.token_ids) == i + 1:
                on_flush(recorder.trace)
            if plan.stops():
                recorder.trace.warnings.append(INTERRUPTED.format(i + 1, plan.tokens))
                break
            if every and (i + 1) % every == 0 and i + 1 < plan.tokens:
                capture.attach()
            else:
                capture.detach()
            before, start = time.perf_counter(), now
            session.read(token)
            forward = time.perf_counter() - before
    finally:
        handle.remove()
        capture.detach()
    with recorder.timed():
        capture.measure_memory(last=True)
    return recorder.finish()
