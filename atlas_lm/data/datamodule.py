"""One DataModule for every source: batches, shuffling, exact resume, and the bytes that bits per byte counts."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, DistributedSampler, Subset

from atlas_lm.data.interfaces import Sample, SequenceDataset, Source, Split
from atlas_lm.data.loader import EpochSampler, ResumableLoader, SteadyLoader
from atlas_lm.data.stream_loader import StreamLoader
from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.data.worker_signals import outlive_signals

log = logging.getLogger(__name__)


@rank_zero_only
def _warn_of_validation() -> None:
    log.warning(
        "warning: the validation text is not that of the checkpointed run: losses from here on cannot be compared with "
        "those before; restore the files, or start a new run from its weights"
    )


class TokenDataModule(lightning.LightningDataModule):
    """Batches of token sequences from one source.

    Every batch is a dict of three (B, T) tensors:

        input_ids       int64
        targets         int64, the token wanted at each position, -100 where nothing is scored
        document_start  bool, True at the first token of a document

    Training is shuffled each epoch, from (seed, epoch) alone, and a checkpoint taken anywhere continues with exactly
    the next batch (see `resume.py`), with any number of workers and of ranks as long as batch_size × ranks stays.
    The samplers split the data over the ranks themselves, so Lightning leaves them alone whether
    `Trainer(use_distributed_sampler=...)` is on or off. Incomplete training batches are left out.

    Validation and test run through `val_sequences` and `test_sequences` sequences, spread evenly over the split and
    always the same ones; as many are left out as it takes for all ranks to get equally many. To validate faster lower
    these rather than `Trainer(limit_val_batches=...)`, of which the byte counts below would not know.

    ValueError: any count below 1 (num_workers and seed: below 0), an empty split, a split shorter than one sequence.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seq_len: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        val_batch_size: int | None = None,
        val_sequences: int | None = None,
        test_sequences: int | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("batch_size", batch_size), ("seq_len", seq_len), ("val_batch_size", val_batch_size),
                            ("val_sequences", val_sequences), ("test_sequences", test_sequences)):  # fmt: skip
            if count is not None and count < 1:
                raise ValueError(f"data.{name}={count} must be at least 1")
        for name, count in (("num_workers", num_workers), ("seed", seed)):
            if count < 0:
                raise ValueError(f"data.{name}={count} must be at least 0")
        self.source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_batch_size = val_batch_size or batch_size
        self._wanted_seq_len = seq_len
        self._limits: dict[Split, int | None] = {"validation": val_sequences, "test": test_sequences}
        self._datasets: dict[Split, SequenceDataset] = {}

    # What the model needs to know

    @property
    def vocab_size(self) -> int:
        """Number of token ids; known before `setup`."""
        return self.source.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The source's tokenizer, None where the tokens are no text; known before `setup`."""
        return self.source.tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer; "none" where the tokens are no text."""
        return "none" if self.tokenizer is None else self.tokenizer.fingerprint()

    def module_arguments(self) -> dict[str, Any]:
        """What the module has to know of the data, by the names of its parameters; a source may have its own."""
        own = getattr(self.source, "module_arguments", None)
        if own is not None:
            return own(self._wanted_seq_len)
        return {
            "vocab_size": self.vocab_size,
            "bytes_per_token": self.validation_bytes_per_token,
            "tokenizer": self.tokenizer_fingerprint,
        }

    @property
    def seq_len(self) -> int:
        """Tokens per sequence, T."""
        return self._dataset("validation" if self.streams else "train").seq_len

    @property
    def streams(self) -> bool:
        """Whether training reads an endless stream rather than epochs of a set."""
        return bool(getattr(self.source, "streams", False))

    # A checkpoint knows the text that its losses were measured on

    def state_dict(self) -> dict[str, Any]:
        """What validation measures, by content."""
        return {"validation": self.held_out_fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say so when the validation text is another one now; resuming with another training text is refused."""
        if state_dict.get("validation") not in (None, self.held_out_fingerprint):
            _warn_of_validation()

    @property
    def held_out_fingerprint(self) -> str:
        """Hash of the validation text and tokenizer: two runs validate on the same only if theirs are equal."""
        return self._dataset("validation").fingerprint()

    # Data

    def setup(self, stage: str | None = None) -> None:
        """Read the corpus, once per process, so that bad data fails before the first step."""
        if not self.streams:
            self._dataset("train")
        self._dataset("validation")

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled batches; ValueError when the split does not fill one batch on every rank."""
        if self.streams:
            if self.num_workers:
                raise ValueError(
                    f"data.num_workers={self.num_workers}: a stream is read by a thread of the training process, set 0"
                )
            stream = self.source.stream(self.seq_len, self.seed)  # type: ignore[attr-defined]
            return StreamLoader(stream, self.batch_size, *self._ranks(), self._pin_memory())
        dataset = self._dataset("train")
        ranks, rank = self._ranks()
        if len(dataset) < ranks * self.batch_size:
            raise ValueError(
                f"the train split holds {len(dataset)} sequences, fewer than batch_size={self.batch_size} on {ranks} "
                "rank(s) take: lower data.batch_size or data.seq_len"
            )
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, ranks, rank, self.seed),
            num_workers=self.num_workers,
            worker_init_fn=outlive_signals,
            drop_last=True,
            pin_memory=self._pin_memory(),
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """The validation sequences in order."""
        return self._held_out_loader("validation")

    def test_dataloader(self) -> DataLoader[Sample]:
        """The test sequences in order; ValueError when the source has no test split."""
        return self._held_out_loader("test")

    # Bytes: what makes losses comparable between tokenizers, and with gzip

    @property
    def validation_tokens(self) -> int:
        """Number of targets that one pass over `val_dataloader` scores, on all ranks together."""
        return self._dataset("validation").scored_tokens(self.held_out_indices("validation"))

    @property
    def validation_bytes(self) -> int | None:
        """Raw bytes that these targets stand for. Bits per byte = sum of their nats / (ln 2 · validation_bytes)."""
        raw = self.held_out_bytes()
        return None if raw is None else len(raw)

    @property
    def validation_bytes_per_token(self) -> float | None:
        """Of exactly these targets; None where they are no text."""
        found = self.validation_bytes
        return found / self.validation_tokens if found else None

    def held_out_bytes(self, split: Split = "validation") -> bytes | None:
        """The raw bytes of exactly the targets that the split's dataloader scores, in order; None: not text."""
        return self._dataset(split).scored_bytes(self.held_out_indices(split))

    def bytes_per_token(self, split: Split = "validation") -> float | None:
        """Raw bytes per token over the whole split, whatever its cap."""
        return self.source.bytes_per_token(split)

    def lost_characters(self, split: Split = "validation") -> float | None:
        """Share of the split's characters that the tokenizer does not give back; None where that is not known."""
        losses = getattr(self.source, "losses", None)
        found = None if losses is None else losses(split)
        return None if found is None else found.share

    def held_out_indices(self, split: Split) -> Sequence[int]:
        """The sequences that the dataloader of a held-out split runs through, ascending.

        ValueError when there are fewer than ranks.
        """
        total, ranks = len(self._dataset(split)), self._ranks()[0]
        count = min(total, self._limits[split] or total) // ranks * ranks
        if not count:
            raise ValueError(
                f"the {split} split gives fewer sequences than the {ranks} ranks need: "
                "raise the cap on its sequences or lower data.seq_len"
            )
        return (np.arange(count) * total // count).tolist()

    def _dataset(self, split: Split) -> SequenceDataset:
        if split not in self._datasets:
            self.source.setup()
            self._datasets[split] = self.source.dataset(split, self._wanted_seq_len)
        return self._datasets[split]

    def _held_out_loader(self, split: Split) -> DataLoader[Sample]:
        ranks, rank = self._ranks()
        chosen: Subset[Any] = Subset(self._dataset(split), self.held_out_indices(split))
        return SteadyLoader(
            chosen,
            batch_size=self.val_batch_size,
            sampler=DistributedSampler(chosen, ranks, rank, shuffle=False),
            num_workers=self.num_workers,
            worker_init_fn=outlive_signals,
            pin_memory=self._pin_memory(),
        )

    def _ranks(self) -> tuple[int, int]:
        """Number of data-parallel ranks and this one's index; (1, 0) outside a Trainer."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)

    def _pin_memory(self) -> bool:
        """Page-locked batches copy to a GPU while it computes."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
