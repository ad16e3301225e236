"""Losses token by token: of whole sequences, of what only their end sees, and of states that were changed.

Sequences longer than PARALLEL tokens are streamed in pieces, so that 64 thousand tokens need no more memory than one
thousand. A stream never restarts its local memories; a shorter sequence restarts them at each shard, as in training.
"""

# B batch, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atlas_lm.evaluation.subject import Text
from atlas_lm.model.atlas import AtlasLM, State
from atlas_lm.model.probes import silent_memory, token_losses
from atlas_lm.model.session import PIECE, Session

PARALLEL = 4096  # tokens
BATCH_TOKENS = 8192  # of one call, so that memory does not grow with length or number of sequences

Tick = Callable[[int], object]  # called with the number of tokens that were just computed


def batches(text: Text, alone: bool = False) -> Iterator[Text]:
    """A few sequences at a time, or each `alone`."""
    rows = 1 if alone else max(1, BATCH_TOKENS // text.tokens_NT.size(1))
    for start in range(0, len(text.tokens_NT), rows):
        yield text.cut(slice(start, start + rows))


@torch.no_grad()
def losses(model: AtlasLM, text: Text, tick: Tick, last: int | None = None) -> Tensor:
    """Nats of every target (N, T), or of the `last` ones alone; NaN where none is scored."""
    length = text.tokens_NT.size(1)
    keep = length if last is None else last
    found = []
    # documents begin at other tokens in every row, and a stream restarts there
    for batch in batches(text, length > PARALLEL and model.config.reset_at_document):
        tokens, targets, starts = batch
        if length <= PARALLEL:
            logits = model(tokens, document_start_BT=starts).logits
            found.append(token_losses(logits[:, -keep:], targets[:, -keep:]))
        else:
            session, parts = model.stream(len(tokens)), []
            for start in range(0, length, PIECE):
                now = batch.cut(slice(None), slice(start, start + PIECE))
                logits = session.read(now.tokens_NT, document_start_BT=now.document_start_NT)
                parts.append(token_losses(logits, now.targets_NT))
            found.append(torch.cat(parts, dim=1)[:, -keep:])
        tick(tokens.numel())
    return torch.cat(found).cpu()


@torch.no_grad()
def after_changes(model: AtlasLM, text: Text, tail: int, block: int, tick: Tick) -> dict[str, Tensor]:
    """Nats of the last `block` targets (N, block), by what was done to the memories `tail` tokens before the end.

    whole: nothing. frozen: they answer and learn no more. restarted: as new. another: the state that another sequence
    has left. zeroed: their output is zero (not their state). Attention and convolutions continue undisturbed.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("whole", "frozen", "restarted", "another", "zeroed")}
    for before, another, rest in _histories(model, text, tail):

        def score(session: Session, rest: Text = rest, write: bool = True) -> Tensor:
            logits = session.read(rest.tokens_NT, write=write, document_start_BT=rest.document_start_NT)
            return token_losses(logits[:, -block:], rest.targets_NT[:, -block:]).cpu()

        found["whole"].append(score(before.fork()))
        found["frozen"].append(score(before.fork(), write=False))
        for name, memory in (("restarted", model.initial_state(len(rest.tokens_NT))), ("another", another)):
            session = before.fork()
            session.state = tuple(
                ours._replace(memory=theirs.memory) for ours, theirs in zip(before.state, memory, strict=True)
            )
            found[name].append(score(session))
        with silent_memory(model):
            found["zeroed"].append(score(before.fork()))
        tick(text.tokens_NT.size(1) * len(rest.tokens_NT))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _histories(model: AtlasLM, text: Text, tail: int) -> Iterator[tuple[Session, State, Text]]:
    """Streams that have read all but the last `tail` tokens, the state of as many others, and those tokens.

    ValueError: there are no two sequences.
    """
    usable = len(text.tokens_NT) // 2 * 2
    if not usable:
        raise ValueError("two sequences are needed to give one the state of another: raise sequences")
    # documents begin at other tokens in every row, and a stream restarts there
    rows = 1 if model.config.reset_at_document else max(2, BATCH_TOKENS // text.tokens_NT.size(1))
    start = 0
    while start < usable:
        end = usable if rows > 1 and usable - start <= rows + 1 else start + rows
        before = _history(model, text.cut(slice(start, end)), tail)
        another = rolled(before.state)
        if rows == 1:
            other = (start - 1) % usable
            another = _history(model, text.cut(slice(other, other + 1)), tail).state
        yield before, another, text.cut(slice(start, end)).last(tail)
        start = end


def _history(model: AtlasLM, text: Text, tail: int) -> Session:
    first, session = text.cut(slice(None), slice(0, -tail)), model.stream(len(text.tokens_NT))
    session.read(first.tokens_NT, document_start_BT=first.document_start_NT)
    return session


def rolled(state: State) -> State:
    """Every row gets the state of the row before it."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.roll(1, dims=0)
        if isinstance(value, tuple):
            parts = [visit(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return tuple(block._replace(memory=visit(block.memory)) for block in state)


@contextmanager
def chunk_size(model: AtlasLM, size: int) -> Iterator[None]:
    """All local memories at this chunk size for a while; a longer one than a shard is the shard."""
    before = model.local_chunks
    model.set_local_chunks((min(size, model.config.shard),) * len(before))
    try:
        yield
    finally:
        model.set_local_chunks(before)
