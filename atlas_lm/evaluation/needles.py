"""Needles in a haystack, token by token: statements in a long text, questions at its end, the gates as trained.

S-NIAH-1 to 3 as RULER has them (arXiv 2404.06654), and several keys, values and questions. An example counts when every
token of every answer is the likeliest, given the true ones before it. Beside it stands the floor: the share of these
very examples whose answers lie within one attention window, about window ÷ length.
"""

# N examples, T tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atlas_lm.data.interfaces import UNSCORED
from atlas_lm.data.needles import keys_of, statement
from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.evaluation.bootstrap import Interval, share
from atlas_lm.evaluation.losses import PARALLEL, Tick, batches, chunk_size
from atlas_lm.evaluation.subject import Subject, Text
from atlas_lm.evaluation.suites import Plan
from atlas_lm.evaluation.tables import Table
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.session import PIECE

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class Task(NamedTuple):
    """`keys` statements with `values` values each, of which `asked` are asked for, all values of each."""

    filler: bool  # repeated sentences instead of text
    digits: int  # of a value; hexadecimal where there are more than 5
    keys: int = 1
    values: int = 1
    asked: int = 1


TASKS = {
    "S-NIAH-1": Task(filler=True, digits=3),
    "S-NIAH-2": Task(filler=False, digits=3),
    "S-NIAH-3": Task(filler=False, digits=32),
    "multi-key": Task(filler=False, digits=3, keys=4),
    "multi-query": Task(filler=False, digits=3, keys=4, asked=4),
    "multi-value": Task(filler=False, digits=3, values=4),
}


class Example(NamedTuple):
    """One row."""

    tokens: Tensor  # (T,)
    targets: Tensor  # (T,), the answers alone scored
    distance: int  # tokens from an asked answer back to where it is stated, the furthest


def example(task: Task, tokenizer: Tokenizer, text: np.ndarray, length: int, seed: int) -> Example:
    """Of `length` tokens. ValueError: they have no room for statements and questions."""
    rng = np.random.default_rng(seed)
    names = keys_of("test")
    symbols = list("0123456789abcdef"[: 10 if task.digits <= 5 else 16])
    chosen = rng.choice(len(names), task.keys, replace=False)
    stated = [
        statement(tokenizer, names[key], "".join(rng.choice(symbols, task.digits)))
        for key in chosen
        for _ in range(task.values)
    ]
    asked = stated[: task.asked * task.values]  # in the order in which they stand: that of one key's values is known
    room = length + 1 - sum(map(len, stated)) - sum(map(len, asked))
    if room < 1:
        raise ValueError(f"{length} tokens have no room for {len(stated)} statements and {len(asked)} questions")
    haystack = np.resize(tokenizer.encode(FILLER), room) if task.filler else text[:room]
    order = [*range(len(stated))] if task.values > 1 else rng.permutation(len(stated)).tolist()
    places = np.sort(rng.integers(0, room + 1, len(stated))).tolist()
    ids, scored, last = [], [], 0
    starts: dict[int, int] = {}
    for place, i in zip(places, order, strict=True):
        tokens, answer = stated[i].joined()
        ids += [haystack[last:place], tokens]
        starts[i] = place + sum(len(stated[j]) for j in starts)
        scored.append(np.zeros(place - last + len(tokens), dtype=bool))
        last = place
    ids.append(haystack[last:])
    scored.append(np.zeros(room - last, dtype=bool))
    at, distance = room + sum(map(len, stated)), 0
    for i, needle in enumerate(asked):
        tokens, answer = needle.joined()
        ids.append(tokens)
        scored.append(answer)
        distance = max(distance, at - starts[i])
        at += len(needle)
    row = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    targets = row[1:].masked_fill(~torch.from_numpy(np.concatenate(scored))[1:], UNSCORED)
    return Example(row[:-1], targets, distance)


@torch.no_grad()
def answered(model: AtlasLM, text: Text, tick: Tick) -> Tensor:
    """Whether every scored token of a row is the likeliest: (N,)."""
    found = []
    for tokens, targets, _ in batches(text):  # one document: what was stated counts to the end
        length = tokens.size(1)
        right = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        session = model.stream(len(tokens)) if length > PARALLEL else None
        for start in range(0, length, PIECE if session else length):
            now = slice(start, start + PIECE if session else length)
            logits = session.read(tokens[:, now]) if session else model(tokens).logits
            wrong = (logits.argmax(-1) != targets[:, now]) & (targets[:, now] != UNSCORED)
            right &= ~wrong.any(1)
        found.append(right)
        tick(tokens.numel())
    return torch.cat(found).cpu()


def haystacks(subject: Subject, length: int, examples: int) -> np.ndarray:
    """(examples, length + 1) tokens of held-out text, one stretch after the other, again from the start at its end."""
    text = subject.text(subject.trained_length, 4096).tokens_NT.cpu().numpy().reshape(-1)
    return np.stack([np.take(text, np.arange(length + 1) + i * length, mode="wrap") for i in range(examples)])


def needles(subjects: Sequence[Subject], plan: Plan, tick: Tick) -> list[Table]:
    """By task and length; and S-NIAH-1 at the training length by chunk size."""
    tables = []
    for name, task in TASKS.items():
        table = Table(f"needles {name}", f"{name}: questions answered", "share", "tokens", ".2f")
        for subject in subjects:
            for times in plan.lengths:
                length = times * subject.trained_length
                found, floor = _share(subject, task, length, plan, tick)
                table.add(subject.name, f"{length:,}", found, length)
                table.add(f"{subject.name}: floor", f"{length:,}", Interval(floor, floor, floor), length)
        tables.append(table)
    title = "S-NIAH-1 at the training length, by chunk size of the local memories"
    by_chunk = Table("needles by chunk", title, "share", "chunk size, tokens", ".2f")
    for subject in subjects:
        for size in plan.chunks if subject.model.local_chunks else ():
            with chunk_size(subject.model, size):
                found, _ = _share(subject, TASKS["S-NIAH-1"], subject.trained_length, plan, tick)
            by_chunk.add(subject.name, str(size), found, size)
    return [*tables, by_chunk]


def _share(subject: Subject, task: Task, length: int, plan: Plan, tick: Tick) -> tuple[Interval, float]:
    """Examples answered, and those that one attention window could answer."""
    text, distances_N = examples(subject, task, length, plan.sequences)
    visible = int((distances_N < subject.window).sum()) / len(distances_N)
    return share(answered(subject.model, text, tick)), visible


def examples(subject: Subject, task: Task, length: int, count: int) -> tuple[Text, Tensor]:
    """So many sequences of `length` tokens, and each one's `Example.distance` (N,), in tokens. ValueError: the run was
    not trained on text, or the sequences have no room."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise ValueError(f"{subject.name} was not trained on text: needles are put into text")
    stacks = haystacks(subject, length, count)
    rows = [example(task, tokenizer, stack, length, seed) for seed, stack in enumerate(stacks)]
    tokens, targets = (torch.stack([getattr(row, name) for row in rows]) for name in ("tokens", "targets"))
    return Text(tokens.to(subject.device), targets.to(subject.device)), torch.tensor([row.distance for row in rows])
