"""Batches of an endless stream, for any number of ranks, that continue exactly after a checkpoint."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import default_collate

from atlas_lm.data.interfaces import Sample
from atlas_lm.data.loader import REMEDIES
from atlas_lm.data.streams import SequenceStream, State, alike

AHEAD = 4  # batches
ENDLESS = 10**12  # batches: a loader without a length Lightning would ask for a batch more than it trains on


class StreamLoader:
    """Iterates over this rank's share of each batch: sequences rank, rank + ranks, … of the next `batch_size` · ranks.

    A thread makes batches ahead; the state is that after the last one handed out. Lightning calls `state_dict` and
    `load_state_dict` by itself; one checkpoint of rank zero serves all ranks.
    """

    def __init__(self, stream: SequenceStream, batch_size: int, ranks: int, rank: int, pin: bool = False) -> None:
        self._stream, self.batch_size, self._ranks, self._rank, self._pin = stream, batch_size, ranks, rank, pin
        self._state: State = stream.state_dict()
        self._batches = 0  # handed out

    def __len__(self) -> int:
        """More batches than anyone trains on."""
        return ENDLESS

    def __iter__(self) -> Iterator[Sample]:
        self._stream.load_state_dict(self._state)
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stopped = threading.Event()

        def put(item: Any) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return True
            return False

        def produce() -> None:
            try:
                while put((self._next(), self._stream.state_dict())):
                    pass
            except BaseException as error:  # of the source: whoever asks for the batch gets it
                put(error)

        thread = threading.Thread(target=produce, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                batch, self._state = item
                self._batches += 1
                yield batch
        finally:
            stopped.set()
            thread.join(5)  # seconds; a reader that hangs must not keep a signal from ending the run

    def _next(self) -> Sample:
        count = self.batch_size * self._ranks
        batch = default_collate(alike(self._stream.take(count, range(self._rank, count, self._ranks))))
        return {name: x.pin_memory() for name, x in batch.items()} if self._pin and torch.cuda.is_available() else batch

    def state_dict(self) -> State:
        """Batches handed out, the stream's position, and what the order depends on; the same on all ranks."""
        return {"batches": self._batches, "stream": self._state, **self._identity()}

    def load_state_dict(self, state: State) -> None:
        """Continue after the batches that `state` counts. ValueError: this loader has another order."""
        if "stream" not in state:
            raise ValueError(
                "cannot resume exactly: the checkpoint's data position is of a set of sequences, not of a stream: "
                "set data.source back, or start a new run from its weights"
            )
        for key, now in self._identity().items():
            if state.get(key) != now:
                raise ValueError(
                    f"cannot resume exactly: {key} was {state.get(key)} in the checkpointed run and is {now} now; "
                    f"{REMEDIES[key]}, or start a new run from its weights"
                )
        self._state, self._batches = state["stream"], int(state["batches"])

    def _identity(self) -> dict[str, Any]:
        return {"global_batch_size": self.batch_size * self._ranks, "data": self._stream.fingerprint()}
