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
from atlas_lm.inspection.capture import AT_ONCE, INTERRUPTED, Plan, Recorder, Rows, Trace
from atlas_lm.inspection.hooks import Handle, Rings, watch
from atlas_lm.inspection.memory import MemoryHealth
from atlas_lm.inspection.schema import Prompt
from atlas_lm.inspection.window import PromptSums, window_weights
from atlas_lm.model.atlas import AtlasLM, State
from atlas_lm.model.attention import AttentionState
from atlas_lm.model.sampling import draw
from atlas_lm.model.session import Session

SAMPLED_ROWS = 128  # steps at least from one row of the memories' health to the next with capture=sampled


class _Call(NamedTuple):
    """What one pass of a block over a piece of the prompt left."""

    hidden_TM: Tensor
    qkv_TC: Tensor
    attention: AttentionState  # before the pass


class _Row(NamedTuple):
    """Of all captured layers."""

    weights_LHtK: Tensor
    seen_t: Tensor
    hidden_LtM: Tensor


class AtlasCapture:
    """Hooks on an AtlasLM: attached for the passes that are captured, so that the others cost nothing.

    The hooks of a token copy what they see, and `take` does the rest for many of them; states come from the session.
    """

    def __init__(self, model: AtlasLM, plan: Plan) -> None:
        self.model = model
        self.chosen = plan.chosen(len(model.blocks)) if plan.every else []
        self.continuous = plan.every == 1
        self.memory = MemoryHealth(model, self.chosen, deep=self.continuous)
        self._handles: list[Handle] = []
        self._piece: dict[int, Tensor] = {}  # of the prompt: layer → queries, keys and values
        self._calls: dict[int, list[_Call]] = {i: [] for i in self.chosen}  # of the prompt
        self._tokens = Rings(AT_ONCE)  # of each token: queries, keys and values of all layers, then hidden states
        self._qkv = [self._tokens.place(f"the attention of layer {i}") for i in self.chosen]
        self._hidden = [self._tokens.place(f"layer {i}") for i in self.chosen]
        self._starts: list[list[AttentionState]] = []  # before the first token of each row
        self._steps: list[int] = []
        self._unmeasured: tuple[int, State | None] | None = None
        self._first: _Row | None = None  # of step 0: the last token of the prompt

    def measure_memory(self, now: State, last: bool = False) -> None:
        """A row of the memories' health, at the step captured last, where it is time for one. `now`: the state at this
        step. `last`: it is the end.

        Only where every token is seen are there residuals and ranks of what was written; they cost most.
        """
        rows = self.memory.columns.steps
        if self._unmeasured is None:
            return
        step, state = self._unmeasured
        if not last and not self.continuous and rows and step - rows[-1] < SAMPLED_ROWS:
            return
        self.memory.measure(step, now if state is None else state, True if last else None)
        self._unmeasured = None

    def attach_to_prompt(self) -> None:
        """From here on passes over the prompt are captured, which may come in pieces."""
        for i in self.chosen:
            block: Any = self.model.blocks[i]
            self._handles += [
                watch(_source(block), self._keep_piece(i)),
                watch(block, self._keep_call(i)),
                *self.memory.hooks_on_prompt(i),
            ]

    def attach(self, state: State) -> None:
        """The next token is captured; `state`: the model's before it."""
        if not self.continuous or not self._tokens.n:  # tokens that follow each other become one row
            self._starts.append([state[i].attention for i in self.chosen])
        if self._handles:
            return
        for i, qkv, hidden in zip(self.chosen, self._qkv, self._hidden, strict=True):
            block: Any = self.model.blocks[i]
            self._handles += [
                watch(_source(block), self._keep(qkv, block.attention.conv is not None)),
                watch(block, self._keep(hidden, True)),
                *self.memory.hooks(i),
            ]

    @property
    def attached(self) -> bool:
        """Whether the next pass is captured."""
        return bool(self._handles)

    def detach(self) -> None:
        """From here on nothing is."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []

    def _keep(self, at: int, first_of_several: bool) -> Callable[..., None]:
        """A hook on a token."""
        if first_of_several:
            return lambda output, *_: self._tokens.put(at, output[0])
        return lambda output, *_: self._tokens.put(at, output)

    def _keep_piece(self, i: int) -> Callable[..., None]:
        def hook(output: Any, *_: Any) -> None:
            self._piece[i] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    def _keep_call(self, i: int) -> Callable[..., None]:
        def hook(output: Any, *arguments: Any) -> None:
            qkv = self._piece.pop(i, None)
            if qkv is None:
                raise RuntimeError(f"the hook on the attention of layer {i} did not fire: its metrics would be empty")
            self._calls[i].append(_Call(output[0][0], qkv, arguments[1].attention))

        return hook

    def captured(self, step: int, state: State) -> None:
        """The pass just made belongs to this step; `state`: the model's after it. RuntimeError: a hook did not fire."""
        self._steps.append(step)
        if step:  # step 0 is the prompt, and its state measured after it
            self._tokens.close()
            self.memory.close()
            # a state that is kept through the next pass costs that pass a warm place to write its own to
            self._unmeasured = step, None if self.continuous else state

    def take(self) -> Rows:
        """See `Adapter`."""
        steps, self._steps = self._steps, []
        if not steps:
            return Rows([], None, None, None)
        first, self._first = self._first, None
        rows = [] if first is None else [first]
        rows += self._rows(len(steps) - len(rows))
        widest = max(row.weights_LHtK.size(3) for row in rows)
        padded = [nnf.pad(row.weights_LHtK, (widest - row.weights_LHtK.size(3), 0)) for row in rows]
        seen, hidden = torch.cat([row.seen_t for row in rows]), torch.cat([row.hidden_LtM for row in rows], dim=1)
        return Rows(steps, torch.cat(padded, dim=2), seen, hidden)

    def _rows(self, times: int) -> list[_Row]:
        """Of the tokens since the last call, which are dropped."""
        starts, self._starts = self._starts, []
        if not times:
            return []
        tokens = [ring[:, 0] for ring in self._tokens.take()]
        qkv_LNC, hidden_LNM = (torch.stack([tokens[at] for at in places]) for places in (self._qkv, self._hidden))
        attention: Any = self.model.blocks[self.chosen[0]].attention
        at_once = times if self.continuous else 1
        rows = []
        for n, start in enumerate(starts):
            part = slice(n * at_once, (n + 1) * at_once)
            pieces = window_weights(qkv_LNC[:, part], start, attention.heads, attention.window)
            states = hidden_LNM[:, part].split([piece.size(2) for piece, _, _ in pieces], dim=1)
            rows += [_Row(piece, seen, hidden) for (piece, seen, _), hidden in zip(pieces, states, strict=True)]
        return rows

    def _taken(self) -> list[list[_Call]]:
        """The passes over the prompt, by layer. RuntimeError: there were none, or not the same number."""
        times = max(1, *(len(calls) for calls in self._calls.values()))
        for i, calls in self._calls.items():
            if len(calls) != times:
                raise RuntimeError(f"the hook on layer {i} fired {len(calls)} times in {times} passes")
        by_layer = list(self._calls.values())
        self._calls = {}
        return by_layer

    def prompt(self, text: str, names: list[str], ids_T: Tensor, logits_TV: Tensor) -> Prompt:
        """What the passes over the prompt, just made, computed. Its last token is the row of step 0."""
        found = Prompt(text=text, tokens=names, surprisal_bits=_surprisals(logits_TV, ids_T))
        attention: Any = self.model.blocks[self.chosen[0]].attention
        by_layer = self._taken()
        sums, start = PromptSums(ids_T.numel()), by_layer[0][0].attention.position
        for calls in zip(*by_layer, strict=True):
            qkv = torch.stack([call.qkv_TC for call in calls])
            pieces = window_weights(qkv, [call.attention for call in calls], attention.heads, attention.window)
            for weights, seen, first in pieces:
                sums.add(weights, seen, first - start)
        sums.into(found, attention.window)
        hidden_LTM = torch.stack([torch.cat([call.hidden_TM for call in calls]) for calls in by_layer])
        last = weights[:, :, -1:, -attention.window :].clone()
        self._first = _Row(last, seen[-1:], hidden_LTM[:, -1:].clone())
        states = metrics.hidden_metrics(hidden_LTM)
        found.norm, found.nonfinite = states.norm.mean(-1).tolist(), states.nonfinite.sum(-1).tolist()
        found.transformation = metrics.transformation(hidden_LTM[:-1], hidden_LTM[1:]).tolist()
        return found


def _source(block: Any) -> Any:
    """The module that gives queries, keys and values, after the convolution where there is one."""
    return block.attention.qkv if block.attention.conv is None else block.attention.conv


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
    recorder = Recorder(capture, plan)
    recorder.trace.memory = capture.memory.columns
    last: list[Tensor] = []
    every = plan.every
    handle = None if every > 1 else watch(model.norm, lambda _, x: last.append(x))
    prompt_T = torch.tensor(list(ids), device=device)
    try:
        start = time.perf_counter()
        if every:
            capture.attach_to_prompt()
        logits_TV = session.read(prompt_T.unsqueeze(0))[0]
        forward = recorder.trace.prompt_seconds = time.perf_counter() - start
        with recorder.timed():
            if every:
                recorder.trace.prompt = capture.prompt(text, names(ids), prompt_T, logits_TV)
                capture.memory.measure(0, session.state, deep=True)
                capture.detach()
            else:
                bits = _surprisals(logits_TV, prompt_T)
                recorder.trace.prompt = Prompt(text=text, tokens=names(ids), surprisal_bits=bits)
        del logits_TV
        generator = torch.Generator(device).manual_seed(plan.seed)
        for i in range(plan.tokens):
            logits_BV, hidden_1M = session.logits, last.pop()[:, -1] if last else None
            assert logits_BV is not None
            last.clear()
            captured = every > 0 and i % every == 0
            if captured:
                capture.captured(i, session.state)
            stopped: FloatingPointError | None = None
            try:
                token = draw(logits_BV, plan.temperature, plan.top_k, generator)
            except FloatingPointError as error:
                stopped, token = error, logits_BV.new_zeros(1, 1, dtype=torch.int64)
            if plan.forced is not None and i < len(plan.forced):
                token = torch.full_like(token, plan.forced[i])
            now = time.perf_counter()
            seen = logits_BV if captured or every < 2 or stopped is not None else None
            reduced = recorder.step(seen, token, hidden_1M, now - start, forward)
            if reduced and every:
                with recorder.timed():
                    capture.measure_memory(session.state, last=i + 1 == plan.tokens)
            if reduced:
                on_flush(recorder.trace)
            asked = plan.stops()
            if stopped is not None or asked or i + 1 == plan.tokens:
                with recorder.timed():
                    capture.measure_memory(session.state, last=True)
            if stopped is not None:
                recorder.trace.warnings.append(f"stopped at step {i}: {stopped}")
                break
            if asked:
                recorder.trace.warnings.append(INTERRUPTED.format(i + 1, plan.tokens))
                break
            if every and (i + 1) % every == 0 and i + 1 < plan.tokens:
                capture.attach(session.state)
            elif capture.attached:
                capture.detach()
            before, start = time.perf_counter(), now
            session.read(token)
            forward = time.perf_counter() - before
    finally:
        capture.detach()
        if handle is not None:
            handle.remove()
    return recorder.finish()
