"""Causal and sequence-to-sequence models of Hugging Face under inspection, while their own `generate` runs.

Nothing of `generate` is replaced: hooks see each pass, a stopping criterion sees each token. The pass over the prompt,
or the encoder's, is the one that generation makes anyway, and raw logits are taken from the model's output, before
temperature, top-k and top-p. Attention needs the implementation that computes weights: attn_implementation="eager".
"""

# B batch, T tokens, H heads, Q queries, K keys, L layers, M model width

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.inspection import metrics
from atlas_lm.inspection.capture import INTERRUPTED, Plan, Recorder, Rows, Trace
from atlas_lm.inspection.layers import PromptLayer, Stack, find_stack, weights_of
from atlas_lm.inspection.schema import Prompt


class HuggingFaceCapture:
    """Hooks on a model: on its passes always, on its layers for the steps that are captured."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self.encoder: Stack | None = None
        part = model
        if model.config.is_encoder_decoder:
            self.encoder, part = find_stack(model.get_encoder()), model.get_decoder()
        self.stack = find_stack(part)
        self.chosen = plan.chosen(len(self.stack.layers)) if plan.every else []
        self.prompt_layers = [PromptLayer() for _ in self.chosen]
        self._handles: list[Any] = []
        self._weights: dict[int, list[Tensor]] = {i: [] for i in self.chosen}  # (H, K) each
        self._cross: dict[int, list[Tensor]] = {i: [] for i in self.chosen}
        self._hidden: dict[int, list[Tensor]] = {i: [] for i in self.chosen}
        self._below: Tensor | None = None
        self._steps: list[int] = []
        self.reading_prompt = False

    # ------------------------------------------------------------------------------------------------- hooks

    def attach(self) -> None:
        """From here on passes of the layers are captured."""
        if self._handles:
            return
        for n, i in enumerate(self.chosen):
            self._handles += [
                self.stack.attention[i].register_forward_hook(self._keep_weights(n, i, self._weights)),
                self.stack.layers[i].register_forward_hook(self._keep_hidden(n, i)),
            ]
            if self.stack.cross:
                self._handles.append(self.stack.cross[i].register_forward_hook(self._keep_weights(n, i, self._cross)))

    def attach_to_encoder(self) -> None:
        """The encoder's pass is that over the prompt."""
        assert self.encoder is not None
        layers = [i for i in self.chosen if i < len(self.encoder.layers)]
        for n, i in enumerate(layers):
            self._handles += [
                self.encoder.attention[i].register_forward_hook(self._read_prompt_weights(n)),
                self.encoder.layers[i].register_forward_hook(self._read_prompt_hidden(n)),
            ]

    def detach(self) -> None:
        """From here on they are not."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep_weights(self, n: int, i: int, into: dict[int, list[Tensor]]) -> Callable[..., None]:
        def hook(module: Any, _: Any, output: Any) -> None:
            weights = weights_of(output, type(module).__name__)[0]
            if self.reading_prompt and into is self._weights and self.encoder is None:
                self.prompt_layers[n].read_weights(weights)
            into[i].append(weights[:, -1].clone() if weights.size(1) > 1 else weights[:, -1])

        return hook

    def _keep_hidden(self, n: int, i: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output)[0]
            if self.reading_prompt and self.encoder is None:
                self._below = self.prompt_layers[n].read_hidden(hidden, self._below)
            self._hidden[i].append(hidden[-1].clone() if hidden.size(0) > 1 else hidden[-1])

        return hook

    def _read_prompt_weights(self, n: int) -> Callable[..., None]:
        return lambda module, _, output: self.prompt_layers[n].read_weights(
            weights_of(output, type(module).__name__)[0], causal=False
        )

    def _read_prompt_hidden(self, n: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output)[0]
            self._below = self.prompt_layers[n].read_hidden(hidden, self._below)

        return hook

    # ------------------------------------------------------------------------------------------------- rows

    def captured(self, step: int) -> None:
        """The pass just made belongs to this step."""
        self._steps.append(step)

    def take(self) -> Rows:
        """See `Adapter`."""
        steps, self._steps = self._steps, []
        if not steps:
            return Rows([], None, None, None)
        self.check_fired(len(steps))
        keys = torch.tensor([row.size(-1) for row in self._weights[self.chosen[0]]])
        weights, hidden = _stacked(self._weights), torch.stack([torch.stack(self._hidden[i]) for i in self.chosen])
        cross = _stacked(self._cross) if self.stack.cross else None
        for rows in (self._weights, self._cross, self._hidden):
            for i in rows:
                rows[i] = []
        return Rows(steps, weights, keys.to(weights.device), hidden, cross)

    def check_fired(self, times: int) -> None:
        """RuntimeError unless every hook on a captured layer fired so many times."""
        for i in self.chosen:
            wanted = [("attention", self._weights[i]), ("hidden state", self._hidden[i])]
            for what, rows in [*wanted, *([("cross attention", self._cross[i])] if self.stack.cross else [])]:
                if len(rows) != times:
                    raise RuntimeError(
                        f"the hook on the {what} of layer {i} fired {len(rows)} times in {times} steps: its metrics "
                        "would be empty"
                    )

    def into(self, prompt: Prompt) -> None:
        """The columns of the prompt, from the pass over it."""
        for i, layer in zip(self.chosen, self.prompt_layers, strict=True):
            if layer.tokens == 0:
                if self.encoder is not None and i >= len(self.encoder.layers):  # the decoder has more
                    continue
                raise RuntimeError(f"the hook on layer {i} did not fire in the prompt: its metrics would be empty")
            layer.into(prompt)
        prompt.transformation = [x for layer in self.prompt_layers for x in layer.transformation]
        self._below = None


def _stacked(rows: dict[int, list[Tensor]]) -> Tensor:
    """(L, H, N, K) from (H, K) for each layer and step, keys padded at the end."""
    longest = max(row.size(-1) for row in next(iter(rows.values())))
    padded = [[nnf.pad(row, (0, longest - row.size(-1))) for row in some] for some in rows.values()]
    return torch.stack([torch.stack(some, dim=1) for some in padded])


class _Watch:
    """What happens at each pass and at each token of one generation."""

    def __init__(self, model: Any, capture: HuggingFaceCapture, recorder: Recorder, plan: Plan, on_flush: Any) -> None:
        self.model, self.capture, self.recorder, self.plan, self.on_flush = model, capture, recorder, plan, on_flush
        self.passes = 0
        self.logits: Tensor | None = None
        self.hidden: Tensor | None = None
        self.prompt_hidden: Tensor | None = None
        self.forward = 0.0
        self.last = self.started = time.perf_counter()

    def before(self, _: Any, __: Any, ___: Any) -> None:
        capture, every = self.capture, self.plan.every
        if self.passes == 0:
            capture.detach()  # from the encoder
        if every and self.passes % every == 0:
            capture.attach()
            capture.captured(self.passes)
        else:
            capture.detach()
        capture.reading_prompt = self.passes == 0
        self.began = time.perf_counter()

    def after(self, _: Any, __: Any, ___: Any, output: Any) -> None:
        self.forward = time.perf_counter() - self.began
        if self.passes == 0:
            self.recorder.trace.prompt_seconds = time.perf_counter() - self.started
        self.logits = output.logits[:, -1]
        self.passes += 1

    def keep_hidden(self, _: Any, arguments: Any) -> None:
        """What the head reads."""
        self.hidden = arguments[0][:, -1]

    def keep_states(self, _: Any, __: Any, output: Any) -> None:
        """The states of the whole prompt, from which the head makes its logits."""
        if self.passes == 0:
            self.prompt_hidden = output[0][0]

    def token(self, ids_BT: Tensor, _: Any, **__: Any) -> Tensor:
        """A stopping criterion: called after each token, it stops when it is asked to."""
        now = time.perf_counter()
        assert self.logits is not None
        captured = self.plan.every < 2 or (self.passes - 1) % self.plan.every == 0
        if self.recorder.step(
            self.logits if captured else None, ids_BT[0, -1], self.hidden, now - self.last, self.forward
        ):
            self.on_flush(self.recorder.trace)
        self.last = now
        stops = self.plan.stops()
        if stops:
            self.recorder.trace.warnings.append(INTERRUPTED.format(self.passes, self.plan.tokens))
        return torch.full((ids_BT.size(0),), stops, device=ids_BT.device)


class _Forced:
    """A processor of logits that leaves the next given token alone."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.at = tokens, 0

    def __call__(self, _: Tensor, scores_BV: Tensor) -> Tensor:
        if self.at >= len(self.tokens):
            return scores_BV
        forced = torch.full_like(scores_BV, -torch.inf)
        forced[:, self.tokens[self.at]] = 0
        self.at += 1
        return forced


def arguments_of(plan: Plan) -> dict[str, Any]:
    """What `generate` is called with."""
    if plan.temperature == 0:
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    else:
        drawn = {"do_sample": True, "temperature": plan.temperature, "top_k": plan.top_k, "top_p": plan.top_p}
    return {"max_new_tokens": plan.tokens, "min_new_tokens": None, "num_beams": 1, **drawn}


@torch.inference_mode()
def inspect(
    model: Any,
    ids: Sequence[int],
    plan: Plan,
    names: Callable[[Sequence[int]], list[str]],
    text: str = "",
    on_flush: Callable[[Trace], None] = lambda _: None,
) -> Trace:
    """`model.generate`, token for token, with everything that `plan` captures. ValueError: an empty prompt, one longer
    than the model's context, or a model that gives no attention weights."""
    longest = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    room = len(ids) if model.config.is_encoder_decoder else len(ids) + plan.tokens
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    if longest is not None and room > longest and not hasattr(model.config, "relative_attention_num_buckets"):
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {plan.tokens} new ones are longer than the model's context of "
            f"{longest}: shorten the prompt or lower tokens="
        )
    from transformers import LogitsProcessorList, StoppingCriteriaList

    capture = HuggingFaceCapture(model, plan)
    recorder = Recorder(capture, plan)
    watch = _Watch(model, capture, recorder, plan, on_flush)
    device = model.get_input_embeddings().weight.device
    prompt_BT = torch.tensor([list(ids)], device=device)
    seq2seq = model.config.is_encoder_decoder
    base = model.get_decoder() if seq2seq else model.base_model
    handles = [
        model.register_forward_pre_hook(watch.before, with_kwargs=True),
        model.register_forward_hook(watch.after, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(watch.keep_hidden),
        base.register_forward_hook(watch.keep_states),
    ]
    prompt = recorder.trace.prompt = Prompt(text=text, tokens=names(ids))
    forced = None if plan.forced is None else LogitsProcessorList([_Forced(plan.forced)])
    torch.manual_seed(plan.seed)
    try:
        if seq2seq and plan.every:
            capture.attach_to_encoder()
        model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), logits_processor=forced,
            stopping_criteria=StoppingCriteriaList([watch.token]), **arguments_of(plan),
        )  # fmt: skip
    except RuntimeError as error:  # no token can be drawn from what is not finite
        if watch.logits is None or bool(watch.logits.isfinite().all()):
            raise
        recorder.step(watch.logits, 0, watch.hidden, time.perf_counter() - watch.last, watch.forward)
        recorder.trace.warnings.append(f"stopped at step {watch.passes - 1}: the logits are not finite ({error})")
    finally:
        for handle in handles:
            handle.remove()
        capture.detach()
    with recorder.timed():
        if plan.every:
            capture.into(prompt)
        if not seq2seq and watch.prompt_hidden is not None:
            prompt.surprisal_bits = _surprisals(model, watch.prompt_hidden, prompt_BT[0])
    return recorder.finish()


def _surprisals(model: Any, hidden_TM: Tensor, ids_T: Tensor, piece: int = 256) -> list[float | None]:
    """Of every token but the first, in pieces: with a large vocabulary all logits of a prompt are gigabytes."""
    found: list[float | None] = []
    for first in range(0, ids_T.numel() - 1, piece):
        some = slice(first, min(first + piece, ids_T.numel() - 1))
        logits = model.get_output_embeddings()(hidden_TM[some])
        found += metrics.surprisal_bits(logits, ids_T[some.start + 1 : some.stop + 1]).tolist()
    return found
