"""Endless sequences in an order that is a function of their number alone: read on the fly, from a set, or mixed.

The n-th sequence is the same for every number of ranks, of batches and of restarts. Ranks take turns, so each of them
goes through all numbers; what is read on the fly is read by all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from atlas_lm.data.interfaces import Sample, SequenceDataset
from atlas_lm.data.packed import token_dtype
from atlas_lm.data.tokenizers import Tokenizer

BLOCK_TOKENS = 1 << 20  # of a stream that is read on the fly; sequences are shuffled within a block
BATCH_BYTES, BATCH_ROWS = 1 << 18, 10_000  # text that is encoded at once: as much as keeps a tokenizer's threads busy

State = dict[str, Any]  # plain containers and tensors; never changed once it is given out


class SequenceStream(Protocol):
    """Sequences 0, 1, 2, …, from a position on."""

    def take(self, count: int, wanted: Sequence[int]) -> list[Sample]:
        """Move on by `count` sequences; the samples of those that are `wanted`, ascending, counted from the first."""

    def state_dict(self) -> State:
        """The position."""

    def load_state_dict(self, state: State) -> None:
        """Go to a position."""

    def fingerprint(self) -> str:
        """Hash of what the order depends on."""


def digest(*parts: Any) -> str:
    """Of JSON values."""
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class SetStream:
    """The sequences of a dataset, again and again, each time in another order, drawn from (seed, time)."""

    def __init__(self, dataset: SequenceDataset, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._time, self._next = 0, 0
        self._order: tuple[int, np.ndarray, str] | None = None  # time, order, its digest

    def take(self, count: int, wanted: Sequence[int]) -> list[Sample]:
        samples = []
        for n in wanted:
            turns, place = divmod(self._next + n, len(self._dataset))
            samples.append(self._dataset[int(self._ordered(self._time + turns)[1][place])])
        turns, self._next = divmod(self._next + count, len(self._dataset))
        self._time += turns
        return samples

    def _ordered(self, time: int) -> tuple[int, np.ndarray, str]:
        if self._order is None or self._order[0] != time:
            order = np.random.default_rng([self._seed, time]).permutation(len(self._dataset))
            self._order = time, order, blake2b(order.tobytes(), digest_size=8).hexdigest()
        return self._order

    def state_dict(self) -> State:
        return {"time": self._time, "next": self._next, "order": self._ordered(self._time)[2]}

    def load_state_dict(self, state: State) -> None:
        self._time, self._next = int(state["time"]), int(state["next"])
        if self._ordered(self._time)[2] != state["order"]:
            raise ValueError("cannot resume exactly: the order of the data is another one: use numpy of the first run")

    def fingerprint(self) -> str:
        return digest("set", self._dataset.fingerprint(), self._seed)


class Rows(Protocol):
    """Documents that are read one after another from a place, as an `IterableDataset` of Hugging Face's."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: State) -> None: ...


class Place(NamedTuple):
    """Where a block begins."""

    number: int  # of the block
    time: int  # how often all rows have been read before
    row: int  # of this time
    rows: State | None  # the reader's own state; None: its beginning
    carry: torch.Tensor  # tokens that were read and are in no block yet, from the one before the block on; (n,) int32


class Block(NamedTuple):
    """Consecutive sequences of a stream that is read on the fly."""

    tokens: np.ndarray  # with the one before the block, (count · seq_len + 2,)
    order: np.ndarray  # (count,)
    after: Place

    def digest(self) -> str:
        """Of tokens and order."""
        return blake2b(self.tokens.tobytes() + self.order.tobytes(), digest_size=16).hexdigest()


class TextStream:
    """Documents joined with separators and cut into sequences while they are read, shuffled block by block.

    `open_rows`: a new reader. `text_of`(number, row): the text of a row, or None to leave it out. A thread reads and
    encodes the next block while this one is trained on. ValueError, from `take`: no row has a text, or one is damaged.
    """

    def __init__(
        self,
        open_rows: Callable[[], Rows],
        text_of: Callable[[int, Any], bytes | None],
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        name: str,
    ) -> None:
        self._open_rows, self._text_of, self._tokenizer = open_rows, text_of, tokenizer
        self._seq_len, self._seed, self._name = seq_len, seed, name
        self._count = max(1, BLOCK_TOKENS // seq_len)  # sequences of a block
        self._thread = ThreadPoolExecutor(1, "stream")
        self._reader: tuple[int, Rows] | None = None  # the thread's; it stands where the block of this number begins
        self._ahead: tuple[int, Future[Block]] | None = None
        self._begin(Place(0, 0, 0, None, torch.tensor([tokenizer.separator_id], dtype=torch.int32)), 0)

    def take(self, count: int, wanted: Sequence[int]) -> list[Sample]:
        samples, chosen = [], set(wanted)
        for n in range(count):
            if self._offset == self._count:
                self._begin(self._loaded().after, 0)
            if n in chosen:
                samples.append(self._sample(self._loaded(), self._offset))
            self._offset += 1
        return samples

    def _begin(self, place: Place, offset: int) -> None:
        self._place, self._offset = place, offset
        self._block: Block | None = None
        self._digest: str | None = None  # what the block has to be; None: not known yet

    def _loaded(self) -> Block:
        """The block of now; the next one is on its way."""
        if self._block is None:
            number = self._place.number
            waiting = self._ahead[1] if self._ahead is not None and self._ahead[0] == number else None
            self._block = (waiting or self._thread.submit(self._read, self._place)).result()
            found = self._block.digest()
            if self._digest not in (None, found):
                raise ValueError(
                    f"{self._name} is not what it was in the checkpointed run: use the same rows, tokenizer and numpy, "
                    "or start a new run from its weights"
                )
            self._digest = found
            self._ahead = number + 1, self._thread.submit(self._read, self._block.after)
        return self._block

    def _read(self, place: Place) -> Block:
        needed = self._count * self._seq_len + 2
        filling = _Filling(needed, token_dtype(self._tokenizer.vocab_size))
        filling.add(place.carry.numpy())
        time, row, state = place.time, place.row, place.rows
        found = row > 0  # a text since the first row
        rows = self._reader[1] if self._reader is not None and self._reader[0] == place.number else None
        self._reader = None
        while filling.missing:
            if rows is None:
                rows = self._open_rows()
                if state is not None:
                    rows.load_state_dict(state)
            batch, ended = self._batch(rows, row)
            row += batch.rows
            for ids, _, _ in self._tokenizer.encode_batch(batch.names, batch.texts):
                if len(ids):
                    filling.add(np.append(ids, self._tokenizer.separator_id))
                    found = True
            state = rows.state_dict()
            if ended:
                if not found:
                    raise ValueError(f"{self._name} holds no text to train on: every row is empty or held out")
                time, row, state, rows, found = time + 1, 0, None, None, False
        after = Place(place.number + 1, time, row, state, filling.carry())
        if rows is not None:
            self._reader = after.number, rows
        order = np.random.default_rng([self._seed, place.number]).permutation(self._count)
        return Block(filling.tokens, order, after)

    def _batch(self, rows: Rows, first: int) -> tuple[_Batch, bool]:
        """Some text, and whether there is no more."""
        batch, size = _Batch([], [], 0), 0
        for row in rows:
            number = first + batch.rows
            batch = batch._replace(rows=batch.rows + 1)
            text = self._text_of(number, row)
            if text:
                batch.names.append(f"{self._name} row {number}")
                batch.texts.append(text)
                size += len(text)
            if size >= BATCH_BYTES or batch.rows >= BATCH_ROWS:
                return batch, False
        return batch, True

    def _sample(self, block: Block, offset: int) -> Sample:
        first = 1 + int(block.order[offset]) * self._seq_len
        tokens = torch.from_numpy(block.tokens[first - 1 : first + self._seq_len + 1].astype(np.int64))
        return {
            "input_ids": tokens[1:-1],
            "targets": tokens[2:],
            "document_start": tokens[:-2] == self._tokenizer.separator_id,
        }

    def state_dict(self) -> State:
        return {**self._place._asdict(), "offset": self._offset, "digest": self._digest}

    def load_state_dict(self, state: State) -> None:
        self._ahead = None
        self._begin(Place(**{name: state[name] for name in Place._fields}), int(state["offset"]))
        self._digest = state["digest"]

    def fingerprint(self) -> str:
        return digest("text", self._name, self._tokenizer.fingerprint(), self._seq_len, self._seed, self._count)


class _Filling:
    """The tokens of a block while they come in, and those that are beyond it."""

    def __init__(self, size: int, dtype: type[np.unsignedinteger[Any]]) -> None:
        self.tokens = np.empty(size, dtype=dtype)
        self.missing = size
        self._beyond: list[np.ndarray] = []

    def add(self, ids: np.ndarray) -> None:
        """The next ones."""
        fitting, beyond = ids[: self.missing], ids[self.missing :]
        first = len(self.tokens) - self.missing
        self.tokens[first : first + len(fitting)] = fitting
        self.missing -= len(fitting)
        if len(beyond):
            self._beyond.append(beyond.astype(np.int32))

    def carry(self) -> torch.Tensor:
        """From the last but one of the block on, (n,) int32."""
        return torch.from_numpy(np.concatenate([self.tokens[-2:].astype(np.int32), *self._beyond]))


class _Batch(NamedTuple):
    names: list[str]
    texts: list[bytes]
    rows: int


class MixStream:
    """Sequences of several streams in fixed shares: each next one is of the stream that lacks most of its share."""

    def __init__(self, parts: dict[str, tuple[SequenceStream, float]]) -> None:
        total = sum(weight for _, weight in parts.values())
        self._parts = [stream for stream, _ in parts.values()]
        self._names = list(parts)
        self._shares = [weight / total for _, weight in parts.values()]
        self._taken = [0] * len(parts)

    def take(self, count: int, wanted: Sequence[int]) -> list[Sample]:
        owners = [self._next() for _ in range(count)]
        samples: dict[int, Sample] = {}
        chosen = set(wanted)
        for p, part in enumerate(self._parts):
            mine = [n for n in range(count) if owners[n] == p]
            here = [i for i, n in enumerate(mine) if n in chosen]
            samples |= dict(zip((mine[i] for i in here), part.take(len(mine), here), strict=True))
        return [samples[n] for n in wanted]

    def _next(self) -> int:
        """The stream of the next sequence."""
        n = sum(self._taken) + 1
        deficits = [share * n - taken for share, taken in zip(self._shares, self._taken, strict=True)]
        p = deficits.index(max(deficits))
        self._taken[p] += 1
        return p

    def state_dict(self) -> State:
        return {"taken": list(self._taken), "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: State) -> None:
        self._taken = [int(count) for count in state["taken"]]
        for part, its in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(its)

    def fingerprint(self) -> str:
        return digest("mix", self._names, self._shares, [part.fingerprint() for part in self._parts])


def alike(samples: Iterable[Sample]) -> list[Sample]:
    """With the same keys: sequences whose targets all count alike get weights of 1 beside some that have others."""
    samples = list(samples)
    if not any("weights" in sample for sample in samples):
        return samples
    return [{"weights": torch.ones(len(sample["targets"])), **sample} for sample in samples]
