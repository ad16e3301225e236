"""Probes of a model's memory: what it retrieves of what was written, and what it is worth to a text (C1, C1b)."""

# B batch, T tokens, V vocabulary, M model width, N sequences of pairs, L layers, H heads, D head dim

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as nnf

from atlas_lm.config.model import ModelConfig
from atlas_lm.data.interfaces import UNSCORED
from atlas_lm.memory.chunked import scan
from atlas_lm.memory.fast_memory import FastMemory
from atlas_lm.memory.state import Gates, Tokens, initial_state
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.block import MemoryBranch

PROBED_TOKENS = 8192  # of one forward pass


def write_and_read(
    model: AtlasLM, keys: Tensor, values: Tensor, query: Tensor, tokens_BT: Tensor | None = None
) -> Tensor:
    """What every memory answers to `query` after it has learned N sequences of T pairs, each from an empty start.

    `keys`, `values`: (L, H, N, T, D), `query`: (L, H, N, D), for the L layers with a memory; keys and queries of unit
    norm. Returns (L, M, H, N, D) with M memories a layer, the global one first.

    The pairs are learned by the code that learns a text, with each memory's own feature map, W_init, chunk size and
    update, and asked for at the first token after them. Random pairs have no hidden state that could open the gates,
    so these stand open (N1: every write at full strength, nothing forgotten); with `tokens_BT` they are the ones
    that the model opens for that text, which shows how much it chooses to write and keep.
    """
    blocks: list[Any] = [block for block in model.blocks if isinstance(block.memory, MemoryBranch)]
    inputs: list[Tensor | None] = [None] * len(blocks) if tokens_BT is None else list(_memory_inputs(model, tokens_BT))
    answers = []
    for block, x_BTM, k, v, q in zip(blocks, inputs, keys, values, query, strict=True):
        with _whole(block):
            hierarchy = block.memory.hierarchy
            memories = [(hierarchy.features_of_local(), memory) for memory in hierarchy.local_memories]
            if hierarchy.global_memory is not None:
                memories = [(hierarchy.features, hierarchy.global_memory), *memories]
            k, v, q = (y.transpose(0, 1) for y in (k, v, q))
            answers.append(torch.stack([_ask(*memory, k, v, q, x_BTM) for memory in memories]))
    return torch.stack(answers).transpose(2, 3)


def _ask(features: Any, memory: FastMemory, k: Tensor, v: Tensor, q: Tensor, x_BTM: Tensor | None) -> Tensor:
    """One memory: k, v (N, H, T, D), q (N, H, D) → (N, H, D)."""
    N, H, T, _ = k.shape
    chunk = min(memory.rule.chunk, T)  # a longer chunk would hold the same pairs
    before = -T % chunk  # nothing is written there; so the last pair ends a chunk, and the question begins the next
    k = torch.cat([q.unsqueeze(2).expand(-1, -1, before, -1), k, q.unsqueeze(2)], dim=2)
    v = torch.cat([v[:, :, :1].expand(-1, -1, before, -1), v, v[:, :, :1]], dim=2)
    length = before + T + 1
    if x_BTM is None:
        one = torch.ones(N, H, length, device=k.device)
        gates = Gates(one, one * memory.eta_max, 0 * one, one)
    else:
        rows = x_BTM.flatten(0, 1)
        gates = memory.open(rows[torch.arange(N * length, device=rows.device) % rows.size(0)].unflatten(0, (N, length)))
    written = torch.ones(length, device=k.device)
    written[:before], written[-1] = 0, 0
    gates = gates._replace(gamma=gates.gamma * written)
    phi = features(k)
    asked = q.unsqueeze(2).expand_as(k)
    rule = memory.rule._replace(chunk=chunk)
    state = initial_state(rule, memory.weights(), N, features.dim_out)
    y, _ = scan(rule, state, memory.weights(), asked, features(asked), Tokens(k, phi, v, gates))
    return y[:, :, -1]


def losses_with_and_without_memory(
    model: AtlasLM, tokens_BT: Tensor, targets_BT: Tensor, document_start_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean nats per target with the memory, and with its output zeroed.

    Only targets further from the start than all layers' attention windows together reach count: the others could have
    been predicted from everything before them by attention alone. In a deep model no sequence may be that long: then
    those further than one window. ValueError: the sequences are too short for that.
    """
    T, window = tokens_BT.size(1), model.config.window
    reach = attention_reach(model.config) + 1
    if reach >= T:
        reach = window
    if reach >= T:
        raise ValueError(
            f"sequences of {T} tokens lie within one attention window, {window} tokens: raise data.seq_len or lower "
            "model.window"
        )

    def loss() -> Tensor:
        logits = model(tokens_BT, document_start_BT=document_start_BT).logits[:, reach:]
        return nnf.cross_entropy(logits.float().flatten(0, 1), targets_BT[:, reach:].flatten())

    with_memory = loss()
    with silent_memory(model):
        return with_memory, loss()


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Nats of every target (B, T), NaN where none is scored."""
    losses = nnf.cross_entropy(logits_BTV.float().mT, targets_BT, ignore_index=UNSCORED, reduction="none")
    return losses.masked_fill(targets_BT == UNSCORED, torch.nan)


def attention_reach(config: ModelConfig, window: int | None = None) -> int:
    """How many tokens back the attention windows of all layers together reach, with their convolutions.

    `window`: as if it were this.
    """
    return config.layers * ((config.window if window is None else window) - 1 + config.attention_conv - 1)


def losses_after_restarts(
    model: AtlasLM,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    distances: Sequence[int],
    block: int,
    document_start_BT: Tensor | None = None,
) -> Tensor:
    """Nats of the last `block` targets, (len(distances) + 1, B, block), NaN where none is scored (W1).

    With every memory restarted so many tokens before the block, and last of all with its whole past. What was read
    before a restart still reaches tokens after it through attention and convolution, and through them, faintly, what
    these write: a gain that is measured so is rather too small. ValueError: a distance beyond the
    sequence.
    """
    start = tokens_BT.size(1) - block
    wrong = [h for h in distances if not 0 <= h <= start]
    if wrong or block < 1:
        raise ValueError(f"{start} tokens lie before a block of {block}, there is no restart {wrong} tokens before it")
    rows = max(1, PROBED_TOKENS // tokens_BT.size(1))
    found = []
    for h in [*distances, None]:
        restart = None
        if h is not None:
            restart = torch.zeros_like(tokens_BT, dtype=torch.bool)
            restart[:, start - h] = True
        parts = []
        for first in range(0, len(tokens_BT), rows):  # a probe may have more rows than a training batch
            now = slice(first, first + rows)
            starts, restarts = (None if x is None else x[now] for x in (document_start_BT, restart))
            logits = model(tokens_BT[now], document_start_BT=starts, restart_BT=restarts).logits
            parts.append(token_losses(logits[:, start:], targets_BT[now, start:]))
        found.append(torch.cat(parts))
    return torch.stack(found)


def _memory_inputs(model: AtlasLM, tokens_BT: Tensor) -> list[Tensor]:
    """The hidden states that open the gates of every layer's memory, (B, T, M) each."""
    seen: list[Tensor] = []
    hooks = [
        hierarchy.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        for hierarchy in model.hierarchies()
    ]
    try:
        model(tokens_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def silent_memory(model: AtlasLM) -> Iterator[None]:
    """Every memory answers zero."""

    def zeroed(_: Any, __: Any, output: tuple[Tensor, Any, Any]) -> tuple[Tensor, Any, Any]:
        return torch.zeros_like(output[0]), *output[1:]

    memories: list[Any] = [block.memory for block in model.blocks]
    hooks = [memory.register_forward_hook(zeroed) for memory in memories if memory is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _whole(block: Any) -> Iterator[None]:
    """The block's parameters, gathered where they are sharded: its memory is called past the block's own forward."""
    if isinstance(block, FSDPModule):
        block.unshard()
    try:
        yield
    finally:
        if isinstance(block, FSDPModule):
            block.reshard()
