"""Documents, concatenated with separators and cut into sequences.

    stream     = d0 d0 d0 SEP d1 d1 SEP d2 ...              one per split
    sequence i = input_ids stream[iT : iT+T], targets stream[iT+1 : iT+T+1]       (T = seq_len)

Sequences do not overlap: each target belongs to exactly one of them. Tokens after the last full sequence are left out.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np
import torch

from atlas_lm.data.interfaces import Document, EmptyDocuments, Sample, SequenceDataset, Split
from atlas_lm.data.losses import KEPT, Losses, check_losses, count_losses, total_losses
from atlas_lm.data.overlap import Overlap, content_key
from atlas_lm.data.tokenizers import Tokenizer, load_tokenizer

BATCH_BYTES = 1 << 20  # documents are encoded in groups of about this many bytes


class Array(Protocol):
    """A one-dimensional array that is read by slices, in memory or on disk."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class HeldOutBytes:
    """The raw text of a held-out split, and which part of it each token stands for."""

    raw: bytes  # documents without separators, and without the characters that no token stands for
    ends: np.ndarray  # (n + 1,) int64; token t of the stream stands for raw[ends[t] : ends[t + 1]]


@dataclass(frozen=True)
class TokenStream:
    """One split: n tokens that stand for `n_bytes` raw bytes."""

    tokens: Array  # (n,) unsigned, every document followed by the separator
    separator_id: int
    n_bytes: int
    fingerprint: str
    held_out: HeldOutBytes | None = None  # kept for validation and test
    losses: Losses | None = None  # of the tokenizer; None: not known


class PackedDataset(SequenceDataset):
    """Non-overlapping sequences of a stream, for next-token prediction.

    Item i: `input_ids` (T,) int64, `targets` (T,) int64 (all scored), `document_start` (T,) bool, True where a document
    begins. ValueError when the stream does not hold one sequence.
    """

    def __init__(self, stream: TokenStream, seq_len: int | None, split: Split) -> None:
        if seq_len is None or seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be a positive number of tokens, e.g. data.seq_len=1024")
        if len(stream.tokens) == 0:
            raise ValueError(
                f"the {split} split is empty: add documents, raise {split}_fraction or name {split} files "
                "(one large file can be cut into documents with document_bytes)"
            )
        if len(stream.tokens) <= seq_len:
            raise ValueError(
                f"the {split} split holds {len(stream.tokens)} tokens but seq_len={seq_len} needs at least "
                f"{seq_len + 1}: lower data.seq_len or add text"
            )
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return (len(self.stream.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        first = index * self.seq_len
        tokens = torch.from_numpy(self.stream.tokens[first : first + self.seq_len + 1].astype(np.int64))
        document_start = torch.empty(self.seq_len, dtype=torch.bool)
        before = self.stream.tokens[max(first - 1, 0) : first]
        document_start[0] = bool((before == self.stream.separator_id).all())  # nothing comes before the first one
        document_start[1:] = tokens[:-2] == self.stream.separator_id
        return {"input_ids": tokens[:-1], "targets": tokens[1:], "document_start": document_start}

    def fingerprint(self) -> str:
        """Hash of the stream and of the cut."""
        return blake2b(f"{self.stream.fingerprint} {self.seq_len}".encode(), digest_size=16).hexdigest()

    def scored_tokens(self, indices: Sequence[int]) -> int:
        """Every target is scored."""
        return len(indices) * self.seq_len

    def scored_bytes(self, indices: Sequence[int]) -> bytes | None:
        """Raw bytes of the targets; separators stand for none. None for the training split, whose text is not kept."""
        if self.stream.held_out is None:
            return None
        raw, ends = self.stream.held_out.raw, self.stream.held_out.ends
        first = np.asarray(indices, dtype=np.int64) * self.seq_len + 1
        return b"".join(raw[ends[f] : ends[f + self.seq_len]] for f in first.tolist())


class PackedSource:
    """Base of the sources that yield documents: tokenizes them into memory, 2 bytes per token (4 above 65536 ids).

    Documents that occur in several splits stay in one of them, see `overlap.py`; `splits_are_drawn` says which.
    """

    splits_are_drawn = False  # by hash, rather than named by the user
    empty_documents = logging.WARNING  # level of the line that counts them

    def __init__(self, tokenizer: str | Tokenizer = "bytes") -> None:
        self._tokenizer = load_tokenizer(tokenizer)
        self._streams: dict[Split, TokenStream] = {}
        self._keys: dict[Split, frozenset[bytes]] = {}  # of the documents, see overlap.py
        self._excluded: frozenset[bytes] = frozenset()

    def documents(self) -> Iterator[Document]:
        """The documents, in the same order at every call. Empty ones are skipped by whoever encodes them."""
        raise NotImplementedError

    def documents_in_memory(self) -> Iterator[Document]:
        """Those that `setup` reads: all of them."""
        return self.documents()

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._tokenizer.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all splits."""
        return self._tokenizer

    def setup(self) -> None:
        """Read and tokenize everything, once. ValueError on bad input and on an empty corpus."""
        if self._streams:
            return
        packers: dict[Split, Packer] = {
            "train": Packer(self._tokenizer, keep_raw=False),
            "validation": Packer(self._tokenizer, keep_raw=True),
            "test": Packer(self._tokenizer, keep_raw=True),
        }
        empty = EmptyDocuments(self.empty_documents)
        for document in self.documents_in_memory():
            packers[document.split].add(document)
            empty.note(document)
        empty.report()
        overlap = Overlap(self.splits_are_drawn)
        for split, packer in packers.items():
            for packed in packer.documents():
                overlap.note(split, packed.key)
        for split, packer in packers.items():
            packer.leave_out(split, overlap)
        overlap.report()
        packers["train"].drop(self._excluded)
        self._keys = {split: packer.keys() for split, packer in packers.items()}
        streams: dict[Split, TokenStream] = {split: packer.stream() for split, packer in packers.items()}
        if not any(len(stream.tokens) for stream in streams.values()):
            raise ValueError(f"{type(self).__name__} found no text: every document is empty, or there is none")
        check_losses({split: stream.losses for split, stream in streams.items() if stream.losses})
        self._streams = streams

    def held_out_keys(self) -> frozenset[bytes]:
        """The contents of validation and test, as overlap.py compares them."""
        self.setup()
        return self._keys["validation"] | self._keys["test"]

    def exclude(self, keys: frozenset[bytes]) -> int:
        """Do not train on documents of these contents, which somebody else holds out; how many there are."""
        self.setup()
        found = len(self._keys["train"] & keys)
        if found:
            self._excluded, self._streams = self._excluded | keys, {}
            self.setup()
        return found

    def dataset(self, split: Split, seq_len: int | None) -> PackedDataset:
        """Sequences of `seq_len` tokens. ValueError when the split is empty or shorter than one of them."""
        self.setup()
        return PackedDataset(self._streams[split], seq_len, split)

    def bytes_per_token(self, split: Split) -> float:
        """Raw bytes per token of the whole split, separators counted as tokens."""
        self.setup()
        stream = self._streams[split]
        return stream.n_bytes / len(stream.tokens) if len(stream.tokens) else math.nan

    def losses(self, split: Split) -> Losses | None:
        """What the tokenizer loses of a split."""
        self.setup()
        return self._streams[split].losses


class Packed(NamedTuple):
    """One document in a stream: n tokens, the last of them the separator."""

    name: str
    tokens: np.ndarray  # (n,)
    n_bytes: int  # raw bytes that tokens stand for
    losses: Losses
    key: bytes | None  # see overlap.py
    raw: bytes  # n_bytes long; empty if it is not kept
    lengths: np.ndarray | None  # (n,) uint32, raw bytes per token, likewise


class Packer:
    """Encodes the documents of one split and joins them to a stream.

    What no token stands for is no part of the raw text and of the byte counts; `losses` has how much that is.
    """

    def __init__(self, tokenizer: Tokenizer, keep_raw: bool) -> None:
        self._tokenizer = tokenizer
        self._keep_raw = keep_raw
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._waiting: list[Document] = []
        self._waiting_bytes = 0
        self._packed: list[Packed] = []
        self._without_token = Losses()

    def add(self, document: Document) -> None:
        """Append one document; one without a token, say an empty one, leaves no trace but in `losses`."""
        self._waiting.append(document)
        self._waiting_bytes += len(document.raw)
        if self._waiting_bytes >= BATCH_BYTES:
            self._encode()

    def _encode(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        encoded = self._tokenizer.encode_batch([d.name for d in waiting], [d.raw for d in waiting])
        for document, (ids, n_bytes, lost) in zip(waiting, encoded, strict=True):
            losses = count_losses(document.raw, lost)
            if not len(ids):
                self._without_token += losses
                continue
            tokens = np.append(ids, self._tokenizer.separator_id).astype(self._dtype)
            raw, n_bytes = (document.raw, n_bytes) if lost is None else _said(document.raw, n_bytes, lost)
            tail = len(raw) - int(n_bytes.sum())  # bytes after the last token count for the separator
            lengths = np.append(n_bytes, tail).astype(np.uint32) if self._keep_raw else None
            kept, key = raw if self._keep_raw else b"", content_key(document.raw)
            self._packed.append(Packed(document.name, tokens, len(raw), losses, key, kept, lengths))

    def documents(self) -> list[Packed]:
        """All documents with a token, encoded."""
        if self._waiting:
            self._encode()
        return self._packed

    def leave_out(self, split: Split, overlap: Overlap) -> None:
        """Drop the documents that another split keeps."""
        kept = []
        for document in self.documents():
            left_out = overlap.leaves_out(split, document.key)
            overlap.count(split, document.name, document.n_bytes, left_out)
            if not left_out:
                kept.append(document)
        self._packed = kept

    def drop(self, keys: frozenset[bytes]) -> None:
        """Leave out the documents of these contents."""
        if keys:
            self._packed = [packed for packed in self.documents() if packed.key not in keys]

    def keys(self) -> frozenset[bytes]:
        """The contents of the documents."""
        return frozenset(packed.key for packed in self.documents() if packed.key is not None)

    def arrays(self) -> tuple[np.ndarray, bytes, np.ndarray, int]:
        """tokens (n,), raw text, bytes per token (n,) uint32, number of raw bytes; the middle two empty if not kept."""
        found = self.documents()
        tokens = np.concatenate([d.tokens for d in found]) if found else np.zeros(0, dtype=self._dtype)
        parts = [d.lengths for d in found if d.lengths is not None]
        lengths = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
        return tokens, b"".join(d.raw for d in found), lengths, sum(d.n_bytes for d in found)

    @property
    def losses(self) -> Losses:
        """What the tokenizer has lost of the documents."""
        return total_losses([d.losses for d in self.documents()], self._without_token)

    def stream(self) -> TokenStream:
        """Everything added so far."""
        tokens, raw, lengths, n_bytes = self.arrays()
        held_out = HeldOutBytes(raw, byte_ends(lengths)) if self._keep_raw else None
        digest = blake2b(tokens.tobytes(), digest_size=16, key=self._tokenizer.fingerprint().encode()).hexdigest()
        return TokenStream(tokens, self._tokenizer.separator_id, n_bytes, digest, held_out, self.losses)


def _said(raw: bytes, n_bytes: np.ndarray, lost: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The bytes of a document that tokens stand for, and how many of them each token does."""
    kept = lost == KEPT
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])[np.cumsum(n_bytes)]
    return np.frombuffer(raw, dtype=np.uint8)[kept].tobytes(), np.diff(ends, prepend=0)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def byte_ends(lengths: np.ndarray) -> np.ndarray:
    """(n,) bytes per token to (n + 1,) int64 cumulative ends."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def cut(document: Document, document_bytes: int) -> Iterator[Document]:
    """Cut a long document after the newlines nearest below `document_bytes`, or between two characters of UTF-8."""
    raw, first, part = document.raw, 0, 1
    while len(raw) - first > document_bytes:
        last = raw.rfind(b"\n", first, first + document_bytes) + 1
        if not last:
            last = first + document_bytes
            while last > first + 1 and raw[last] & 0xC0 == 0x80:
                last -= 1
        yield Document(f"{document.name} (part {part})", raw[first:last], document.split)
        first, part = last, part + 1
    yield Document(f"{document.name} (part {part})" if first else document.name, raw[first:], document.split)
