"""What a source of sequences offers, and the split of documents that all text sources share.

Two ways to be a source: implement `Source` (as `recall.py` and `tokens.py` do), or yield `Document`s and inherit the
rest from `packed.PackedSource` (as `stdlib.py`, `text.py` and `hf.py` do; these can also be written to shards).
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import Dataset

from atlas_lm.data.ranks import rank_zero_only
from atlas_lm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# One sequence, and with a leading B one batch: input_ids (T,) int64, targets (T,) int64, document_start (T,) bool.
Sample = dict[str, Tensor]
UNKNOWN_EMBEDDER = "unknown"  # of vectors whose file does not say what has made them
UNSCORED = -100  # a target that no loss counts, as in torch.nn.functional.cross_entropy


class SequenceDataset(Dataset[Sample]):
    """A map-style dataset of sequences of `seq_len` tokens; item i is the same at every call and in every process."""

    seq_len: int

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of the content: equal fingerprints mean equal items."""
        raise NotImplementedError

    def scored_tokens(self, indices: Sequence[int]) -> int:
        """Number of targets other than -100 in these items."""
        raise NotImplementedError

    def scored_bytes(self, indices: Sequence[int]) -> bytes | None:
        """The raw bytes that these items' targets stand for, in order; None where the text is not kept, or is none."""
        raise NotImplementedError


@runtime_checkable
class Source(Protocol):
    """Where the sequences come from. `vocab_size` and `tokenizer` are known before `setup`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def setup(self) -> None:
        """Read what has to be read. Called once per process; ValueError on bad input."""

    def dataset(self, split: Split, seq_len: int | None) -> SequenceDataset:
        """The sequences of one split. ValueError when the split is empty or too short for `seq_len` tokens."""

    def bytes_per_token(self, split: Split) -> float | None:
        """Raw bytes per token, separators included, over the whole split; None where the sequences are no text."""


@dataclass(frozen=True)
class Document:
    """One text: a file, a line of JSON, a row of a table."""

    name: str  # for error messages: a path, or path:line
    raw: bytes
    split: Split


class EmptyDocuments:
    """Counts the documents without text, and says so: they are named and matched, and nothing of them is read."""

    def __init__(self, level: int = logging.WARNING) -> None:
        self._level = level
        self._total: Counter[Split] = Counter()
        self._empty: dict[Split, list[str]] = defaultdict(list)

    def note(self, document: Document) -> None:
        """Count one document."""
        self._total[document.split] += 1
        if not document.raw.strip():
            self._empty[document.split].append(document.name)

    @rank_zero_only
    def report(self) -> None:
        """Log how many there are of each split."""
        for split, names in self._empty.items():
            log.log(
                self._level, "data: %d of %d documents of the %s split hold no text, such as %s",
                len(names), self._total[split], split, names[0],
            )  # fmt: skip


def split_of(key: bytes, validation_fraction: float, test_fraction: float) -> Split:
    """The split that a document belongs to, from a hash of `key` alone.

    It depends neither on the other documents nor on their order, so a growing corpus never moves a document from
    training into the held-out text.
    """
    position = int.from_bytes(blake2b(key, digest_size=8).digest(), "big") / 2**64
    if position < validation_fraction:
        return "validation"
    return "test" if position < validation_fraction + test_fraction else "train"


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """ValueError unless both are in [0, 1) and leave something to train on."""
    if not (0 <= validation_fraction < 1 and 0 <= test_fraction < 1 and validation_fraction + test_fraction < 1):
        raise ValueError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} must each be in [0, 1) "
            "and their sum below 1; 0.05 and 0.05 are usual"
        )
