"""What is measured: position, horizon, state, chunks. Needles have a file of their own."""

# N sequences, T tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from atlas_lm.evaluation.bootstrap import interval
from atlas_lm.evaluation.losses import Tick, after_changes, chunk_size, losses
from atlas_lm.evaluation.subject import Subject
from atlas_lm.evaluation.tables import Table

CHUNKS = (1, 4, 8, 16, 32, 64)


class Plan(NamedTuple):
    """How much is measured, the same for all runs."""

    sequences: int  # held-out sequences
    length: int  # tokens of each
    block: int  # tokens at their end
    chunks: tuple[int, ...] = CHUNKS
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)  # of needles' haystacks, times the training length


def position(subjects: Sequence[Subject], plan: Plan, tick: Tick) -> list[Table]:
    """Loss by position, in bins that double: does it fall beyond the reach of attention?"""
    table = Table("position", "Loss by position", "nats per token", "position, tokens")
    edges = [0, 16]
    while edges[-1] < plan.length:
        edges.append(min(2 * edges[-1], plan.length))
    for subject in subjects:
        found = losses(subject.model, subject.text(plan.length, plan.sequences), tick)
        for start, end in pairwise(edges):
            table.add(subject.name, f"{start}–{end - 1}", interval(found[:, start:end]), (start + end) / 2)
    table.notes += [_reach(subject) for subject in subjects]
    return [table]


def contexts(plan: Plan) -> list[int]:
    """How many tokens up to the end a model sees: from the block alone, 1, 1.5, 2, 3, 4, 6 … blocks."""
    found, size = [], plan.block
    while size <= plan.length:
        found += [size, size * 3 // 2]
        size *= 2
    return [c for c in found if c <= plan.length]


def horizon(subjects: Sequence[Subject], plan: Plan, tick: Tick) -> list[Table]:
    """The loss of a fixed final block while the context before it grows; and what lies beyond attention's reach."""
    table = Table("horizon", f"Loss of the last {plan.block} tokens by the context that is seen", "nats per token",
                  "tokens seen, the block included")  # fmt: skip
    gains = Table("gain", "Context gain: loss at attention's reach less loss at the whole context", "nats per token",
                  "")  # fmt: skip
    least = min(plan.length, plan.block + min(subject.reach for subject in subjects))
    for subject in subjects:
        text = subject.text(plan.length, plan.sequences)
        seen = {}
        for c in sorted({*contexts(plan), least}):
            seen[c] = losses(subject.model, text.last(c), tick, plan.block)
            table.add(subject.name, f"{c:,}", interval(seen[c]), c)
        if least < plan.length:
            gains.add(subject.name, f"{least:,} → {plan.length:,}", interval(seen[least] - seen[max(seen)]))
    gains.notes += captured(subjects, gains, plan.length)
    table.notes += [_reach(subject) for subject in subjects]
    return [table, gains]


def captured(subjects: Sequence[Subject], gains: Table, length: int) -> list[str]:
    """Which share of the gain of full attention each run has; what that one gains is what the corpus offers."""
    full = next((s.name for s in subjects if s.window >= length and s.name in gains.cells), None)
    if full is None:
        return ["- No run attends to the whole length: what this text offers is not known."]
    offered = next(iter(gains.cells[full].values()))
    if not offered.low > 0:  # NaN too
        return [f"- Full attention ({full}) gains nothing on this text: it tests no memory."]
    means = {name: next(iter(cells.values())).mean for name, cells in gains.cells.items() if name != full}
    return [
        f"- {name} captures {mean / offered.mean:.0%} of what full attention ({full}) gains."
        for name, mean in means.items()
    ]


def state(subjects: Sequence[Subject], plan: Plan, tick: Tick) -> list[Table]:
    """The loss of the final block after the memory's state was changed where attention's reach before it begins."""
    table = Table("state", f"Rise of the loss of the last {plan.block} tokens when the memory's state is changed",
                  "nats per token", "")  # fmt: skip
    for subject in subjects:
        if not subject.has_memory:
            table.notes.append(f"{subject.name} has no memory.")
            continue
        tail = plan.block + subject.reach
        if tail >= plan.length:
            table.notes.append(f"{subject.name}: attention reaches all of {plan.length} tokens, raise length.")
            continue
        found = after_changes(subject.model, subject.text(plan.length, plan.sequences), tail, plan.block, tick)
        table.add(subject.name, "whole (loss)", interval(found["whole"]))
        for name in ("restarted", "frozen", "another", "zeroed"):
            table.add(subject.name, name, interval(found[name] - found["whole"]))
        table.notes.append(f"{subject.name}: changed {tail} tokens before the end.")
    return [table]


def chunks(subjects: Sequence[Subject], plan: Plan, tick: Tick) -> list[Table]:
    """The loss at other chunk sizes of the local memories, without training."""
    table = Table("chunks", "Loss by chunk size of the local memories", "nats per token", "chunk size, tokens")
    for subject in subjects:
        text = subject.text(plan.length, plan.sequences)
        if not subject.model.local_chunks:
            table.add(subject.name, "no local memory", interval(losses(subject.model, text, tick)))
            continue
        for size in plan.chunks:
            with chunk_size(subject.model, size):
                table.add(subject.name, str(size), interval(losses(subject.model, text, tick)), size)
    return [table]


def _reach(subject: Subject) -> str:
    return f"- {subject.name}: one window is {subject.window} tokens, attention reaches {subject.reach} back."


SUITES: dict[str, Callable[[Sequence[Subject], Plan, Tick], list[Table]]] = {
    "position": position,
    "horizon": horizon,
    "state": state,
    "chunks": chunks,
}
