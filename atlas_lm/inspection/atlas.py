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
from atlas_lm.inspection.capture import Plan, Recorder, Rows, Trace
from atlas_lm.inspection.memory import MemoryHealth
from atlas_lm.inspection.schema import Prompt
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.attention import AttentionState, rotate
from atlas_lm.model.block import MemoryBranch
from atlas_lm.model.sampling import draw
from atlas_lm.model.session import Session

QUERIES = 256  # whose weights are computed at a time


def window_weights(qkv_TC: Tensor, state: AttentionState, heads: int, window: int) -> list[tuple[Tensor, Tensor, int]]:
    """The attention weights of T tokens that follow `state`, in pieces: (H, t, K), the keys that each sees (t,), and
    the position of the first key; those that a query does not see weigh 0. `qkv_TC`: (T, 3·H·D) after the convolution.
    """
    q, k, _ = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in qkv_TC.chunk(3, dim=-1))
    q, k = (rotate(x, state.position, state.base) for x in (q, k))
    keys_HKD = torch.cat([state.k[0].to(k.dtype), k], dim=1)
    valid_K = torch.cat([state.valid, state.valid.new_ones(q.size(1))])
    pieces = []
    for first in range(0, q.size(1), QUERIES):
        part = q[:, first : first + QUERIES]
        some = slice(first, first + part.size(1) + window - 1)
        scores = part @ keys_HKD[:, some].mT * part.size(-1) ** -0.5
        ones = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
        may = ones.triu() & ones.tril(window - 1) & valid_K[some]
        weights = scores.masked_fill(~may, -torch.inf).softmax(-1)
        pieces.append((weights, may.sum(-1), state.position - (window - 1) + first))
    return pieces


class _Call(NamedTuple):
    """What one forward pass of a block left."""

    hidden_TM: Tensor
    qkv_TC: Tensor
    attention: AttentionState  # before the pass


class _Row(NamedTuple):
    """Of one layer."""

    weights_HtK: Tensor
    seen_t: Tensor
    hidden_tM: Tensor


class AtlasCapture:
    """Hooks on an AtlasLM: attached for the passes that are captured, so that the others cost nothing."""

    def __init__(self, model: AtlasLM, plan: Plan) -> None:
        self.model = model
        self.chosen = plan.chosen(len(model.blocks)) if plan.every else []
        self.continuous = plan.every == 1
        self.memory = MemoryHealth(model, self.chosen, self.continuous)
        self._handles: list[Any] = []
        self._qkv: dict[int, Tensor] = {}
        self._calls: dict[int, list[_Call]] = {i: [] for i in self.chosen}
        self._steps: list[int] = []
        self._unmeasured: int | None = None
        self._first: list[_Row] = []  # of step 0, by layer: the last token of the prompt

    def measure_memory(self, deep: bool | None = None) -> None:
        """A row of the memories' health, at the step captured last; none where no step was since the last row."""
        if self._unmeasured is not None:
            self.memory.measure(self._unmeasured, deep)
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
            self._calls[i].append(_Call(output[0][0], qkv, arguments[1].attention))
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
        first, self._first = self._first, []
        weights, hidden, keys = [], [], None
        for n, i in enumerate(self.chosen):
            calls, self._calls[i] = self._calls[i], []
            if len(calls) + bool(first) != len(steps):
                raise RuntimeError(f"the hook on layer {i} fired {len(calls)} times in {len(steps)} steps")
            rows = [first[n]] if first else []
            if self.continuous and calls:  # one row of tokens
                joined = torch.cat([call.qkv_TC for call in calls])
                rows += self._rows(
                    i, calls[0]._replace(qkv_TC=joined, hidden_TM=torch.cat([c.hidden_TM for c in calls]))
                )
            else:
                rows += [row for call in calls for row in self._rows(i, call)]
            widest = max(row.weights_HtK.size(2) for row in rows)
            weights.append(
                torch.cat([nnf.pad(row.weights_HtK, (widest - row.weights_HtK.size(2), 0)) for row in rows], dim=1)
            )
            keys = torch.cat([row.seen_t for row in rows])
            hidden.append(torch.cat([row.hidden_tM for row in rows]))
        return Rows(steps, torch.stack(weights), keys, torch.stack(hidden))

    def _rows(self, i: int, call: _Call) -> list[_Row]:
        attention: Any = self.model.blocks[i].attention
        pieces = window_weights(call.qkv_TC, call.attention, attention.heads, attention.window)
        hidden = call.hidden_TM.split([piece.size(1) for piece, _, _ in pieces])
        return [_Row(piece, seen, states) for (piece, seen, _), states in zip(pieces, hidden, strict=True)]

    def prompt(self, text: str, names: list[str], ids_T: Tensor, logits_TV: Tensor) -> Prompt:
        """What the passes over the prompt, just made, computed. Its last token is the row of step 0."""
        found = Prompt(text=text, tokens=names, surprisal_bits=_surprisals(logits_TV, ids_T))
        below: Tensor | None = None
        for i in self.chosen:
            calls, self._calls[i] = self._calls[i], []
            if not calls:
                raise RuntimeError(f"the hook on layer {i} did not fire: its metrics would be empty")
            attention: Any = self.model.blocks[i].attention
            layer, start = _PromptLayer(ids_T.numel()), calls[0].attention.position
            for call in calls:
                pieces = window_weights(call.qkv_TC, call.attention, attention.heads, attention.window)
                for weights, seen, first in pieces:
                    layer.add(weights, seen, first - start)
            layer.into(found, attention.window)
            hidden_TM = torch.cat([call.hidden_TM for call in calls])
            self._first.append(_Row(weights[:, -1:, -attention.window :].clone(), seen[-1:], hidden_TM[-1:].clone()))
            states = metrics.hidden_metrics(hidden_TM)
            found.norm.append(float(states.norm.mean()))
            found.nonfinite.append(int(states.nonfinite.sum()))
            if below is not None:
                found.transformation.append(float(metrics.transformation(below, hidden_TM)))
            below = hidden_TM
        return found


def _surprisals(logits_TV: Tensor, ids_T: Tensor) -> list[float | None]:
    """Of every token but the first."""
    return metrics.surprisal_bits(logits_TV[:-1], ids_T[1:]).tolist() if ids_T.numel() > 1 else []


class _PromptLayer:
    """Sums over the pieces of a prompt, of one layer."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.queries = tokens, 0
        self.entropy = self.concentration = self.seen = torch.zeros(())
        self.mass: Tensor | None = None

    def add(self, weights_HtK: Tensor, seen_t: Tensor, first: int) -> None:
        """A piece of weights; `first`: the position of its first key."""
        of = metrics.head_metrics(weights_HtK, seen_t)
        n = weights_HtK.size(1)
        self.queries += n
        self.entropy = self.entropy + of.entropy_bits.mean(0).sum()
        self.concentration = self.concentration + of.concentration.mean(0).sum()
        self.seen = self.seen + metrics.seen_keys(weights_HtK) * n
        if self.mass is None:
            self.mass = weights_HtK.new_zeros(weights_HtK.size(0), self.tokens)
        inside = slice(max(0, -first), weights_HtK.size(2))
        mass = weights_HtK.sum(1)[:, inside][:, : self.tokens - max(0, first)]
        self.mass[:, max(0, first) : max(0, first) + mass.size(1)] += mass

    def into(self, prompt: Prompt, window: int) -> None:
        """A row of every column."""
        assert self.mass is not None
        prompt.entropy_mean.append(float(self.entropy) / self.queries)
        prompt.concentration_mean.append(float(self.concentration) / self.queries)
        prompt.seen_keys.append((self.seen / self.queries).tolist())
        prompt.basin.append(metrics.relative_basin(self.mass, window).tolist())


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
        start = time.perf_counter()
        if plan.every:
            capture.attach()
        logits_TV = session.read(prompt_T.unsqueeze(0))[0]
        forward = recorder.trace.prompt_seconds = time.perf_counter() - start
        with recorder.timed():
            if plan.every:
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
            if plan.every and i % plan.every == 0:
                capture.captured(i)
            stopped: FloatingPointError | None = None
            try:
                token = draw(logits_BV, plan.temperature, plan.top_k, generator)
            except FloatingPointError as error:
                stopped, token = error, logits_BV.new_zeros(1, 1, dtype=torch.int64)
            if plan.forced is not None and i < len(plan.forced):
                token = torch.full_like(token, plan.forced[i])
            now = time.perf_counter()
            if recorder.step(logits_BV[0], token[0, 0], hidden_M, now - start, forward) and plan.every:
                with recorder.timed():
                    capture.measure_memory()
            if stopped is not None:
                recorder.trace.warnings.append(f"stopped at step {i}: {stopped}")
                break
            if len(recorder.trace.steps.token_ids) == i + 1:
                on_flush(recorder.trace)
            if plan.every and (i + 1) % plan.every == 0 and i + 1 < plan.tokens:
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
        capture.measure_memory(deep=True)
    return recorder.finish()
