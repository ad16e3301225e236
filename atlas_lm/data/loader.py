"""A shuffled DataLoader that continues with exactly the next batch after a checkpoint.

The order of an epoch is a permutation drawn from (seed, epoch) alone, the same on all ranks; rank r of W takes every
W-th sample of it, from r on. So the state is two integers, (epoch, batches), and one checkpoint, written by rank 0,
serves all ranks and any number of workers. Beside them the state holds what the order depends on, and loading it into
another order is an error: neither a repeated nor a skipped batch goes unnoticed.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from atlas_lm.data.interfaces import Sample, SequenceDataset
from atlas_lm.data.worker_signals import signals_held


class EpochSampler(DistributedSampler[int]):
    """This rank's share of a permutation of the dataset, drawn from (seed, epoch).

    A `DistributedSampler` by type, because Lightning replaces every other sampler by one that cannot resume. With W
    ranks the last len(dataset) % W samples of an epoch's permutation are left out, so that all ranks get equally many.
    """

    def __init__(self, dataset: SequenceDataset, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        self.sequences = dataset
        self._plan = (0, 0)

    def permutation(self, epoch: int) -> np.ndarray:
        """(len(dataset),) int64, the order of one epoch over all ranks."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.sequences))

    def begin(self, epoch: int, skip: int) -> None:
        """Let the next iterators run through `epoch`, without this rank's first `skip` samples."""
        self._plan = (epoch, skip)

    def __iter__(self) -> Iterator[int]:
        epoch, skip = self._plan
        mine = self.permutation(epoch)[: self.total_size][self.rank :: self.num_replicas]
        return iter(mine[skip:].tolist())


class SteadyLoader(DataLoader[Sample]):
    """A DataLoader whose workers are started with signals held, so that none dies before it can outlive them."""

    def __iter__(self) -> Any:
        with signals_held():
            return super().__iter__()


class ResumableLoader(SteadyLoader):
    """A DataLoader over an `EpochSampler` with `state_dict` and `load_state_dict`, which Lightning calls by itself.

    Each `iter()` is a new epoch: the one after the last, or the one set with `sampler.set_epoch` (as Lightning does).
    After `load_state_dict` the first one is the rest of the interrupted epoch, unless `set_epoch` has moved on.
    """

    _position: tuple[int, int] | None = None  # epoch, batches of it handed out
    _resume: bool = False

    def __iter__(self) -> Any:
        # A generator, so that the epoch is read at the first batch: Lightning sets it only after `iter()`.
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Lightning's overfit_batches put another one in its place
            yield from super().__iter__()
            return
        assert self.batch_size is not None
        epoch, batches = sampler.epoch, 0
        if self._resume and self._position is not None and self._position[0] == epoch:
            batches = self._position[1]
        self._resume = False
        sampler.begin(epoch, batches * self.batch_size)
        sampler.set_epoch(epoch + 1)
        for batch in super().__iter__():
            batches += 1
            self._position = (epoch, batches)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out, and what their order depends on; the same on all ranks."""
        if not isinstance(self.sampler, EpochSampler):
            return {"not_resumable": type(self.sampler).__name__}
        epoch, batches = self._position or (self.sampler.epoch, 0)
        return {"epoch": epoch, "batches": batches, **self._identity(self.sampler, epoch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that `state` counts. ValueError: this loader has another order."""
        if not isinstance(self.sampler, EpochSampler):
            raise ValueError("overfit_batches replaces the sampler, so a run cannot be resumed with it: leave it out")
        if "epoch" not in state or "batches" not in state:
            raise ValueError(
                f"the checkpoint's data position is {state}, not of ResumableLoader: its run cannot be resumed exactly "
                "(overfit_batches does that); start a new run from its weights"
            )
        epoch, batches = int(state["epoch"]), int(state["batches"])
        for key, now in self._identity(self.sampler, epoch).items():
            if state.get(key) != now:
                raise ValueError(
                    f"cannot resume exactly: {key} was {state.get(key)} in the checkpointed run and is {now} now; "
                    f"{REMEDIES[key]}, or start a new run from its weights"
                )
        # A checkpoint of a finished epoch continues with the next one, not with the empty rest of this one.
        self._position = (epoch, batches) if batches < len(self) else (epoch + 1, 0)
        self._resume = True
        self.sampler.set_epoch(self._position[0])

    def _identity(self, sampler: EpochSampler, epoch: int) -> dict[str, Any]:
        assert self.batch_size is not None
        order = sampler.permutation(epoch).tobytes()
        return {
            "seed": sampler.seed,
            "global_batch_size": self.batch_size * sampler.num_replicas,
            "sequences": len(sampler.sequences),
            "data": sampler.sequences.fingerprint(),
            "order": blake2b(order, digest_size=8).hexdigest(),
        }


REMEDIES = {
    "seed": "set data.seed back",
    "global_batch_size": "set data.batch_size times the number of ranks back",
    "sequences": "use the same corpus and data.seq_len",
    "data": "use the same corpus, tokenizer and data.seq_len",
    "order": "use the numpy version of the first run",
}
