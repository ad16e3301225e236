"""Embedded documents as a source of batches: windows of a few frames, or long histories, by one rule.

A sample is a run of T frames of one document, with frames before and after it for whoever compares with neighbours:

    frames  (BEFORE + T + AFTER, D)   position t of the run is frame BEFORE + t; zeros where the document has none
    valid   (BEFORE + T + AFTER,)     whether there is a frame
    scored  (T,)                      whether the frame after position t is to be predicted

Positions with a whole context before them are scored, each of them once: runs overlap by a context less one frame. With
T = context a sample is one window of the seed.
"""

# B batch, T frames of a run, D dimensions

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from atlas_lm.data.interfaces import UNKNOWN_EMBEDDER, Sample, SequenceDataset, Split, check_fractions
from atlas_lm.latent.audit import Audit, audit
from atlas_lm.latent.frames import FrameSet, Piece, check_documents, read_frames

log = logging.getLogger(__name__)

BEFORE, AFTER = 3, 3  # frames on either side of a run


class EmbeddingSource:
    """`path`: a folder of `embed`, or an npz. `out_of_domain`: the same, of other text by the same embedder.

    `context`: frames that a prediction sees at least. The split is by document: a folder has that of its text, an npz
    one by the hash of the document's id. ValueError: bad data, one document only, an empty split, another embedder.
    """

    streams = False

    def __init__(
        self,
        path: str,
        out_of_domain: str | None = None,
        context: int = 5,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> None:
        if context < 2:
            raise ValueError(f"data.source.context={context} must be at least 2 frames; 5 is usual")
        check_fractions(validation_fraction, test_fraction)
        self.path, self.out_of_domain, self.context = path, out_of_domain, context
        self.fractions = (validation_fraction, test_fraction)
        self._frames: FrameSet | None = None
        self._other: FrameSet | None = None
        self._audit: Audit | None = None

    @property
    def vocab_size(self) -> int:
        """0: there are no tokens."""
        return 0

    @property
    def tokenizer(self) -> None:
        """None: there is no text."""
        return None

    def setup(self) -> None:
        """Read, check and audit the vectors, once."""
        if self._frames is not None:
            return
        frames = read_frames(self.path, self.context, *self.fractions)
        check_documents(frames.pieces, self.context + 1, repr(self.path), embedded=not frames.windows)
        other = None
        if self.out_of_domain is not None:
            other = read_frames(self.out_of_domain, self.context, 0.0, 0.0, "data.source.out_of_domain")
            _check_same_embedder(frames, other)
            if not other.of(None, self.context + 1):
                raise ValueError(
                    f"{self.out_of_domain!r}: no document has {self.context + 1} frames: embed longer ones"
                )
        self._audit = audit(frames, self.context + 1, other)
        _report(self._audit)
        self._frames, self._other = frames, other

    @property
    def frames(self) -> FrameSet:
        """The set; read when it is first asked for."""
        self.setup()
        assert self._frames is not None
        return self._frames

    @property
    def audit(self) -> Audit:
        """What was found."""
        self.setup()
        assert self._audit is not None
        return self._audit

    def documents(self, split: Split | str) -> list[Tensor]:
        """Vectors (F, D) of each document that is long enough; `out-of-domain`: of the other set."""
        least = self.context + 1
        if split == "out-of-domain":
            self.setup()
            found = [] if self._other is None else self._other.documents(None, least)
        else:
            found = self.frames.documents(split, least)  # type: ignore[arg-type]
        return [torch.from_numpy(np.array(vectors)) for vectors in found]

    def module_arguments(self, seq_len: int | None) -> dict[str, Any]:
        """What a `LatentModule` has to know of the data."""
        history = self.context if seq_len is None else seq_len
        return {
            "dim": self.frames.dim, "embedder": self.frames.embedder, "context": self.context, "history": history,
        }  # fmt: skip

    def dataset(self, split: Split, seq_len: int | None) -> EmbeddingDataset:
        """Runs of `seq_len` frames; None: of a context."""
        return EmbeddingDataset(self.frames, split, self.context, self.context if seq_len is None else seq_len)

    def bytes_per_token(self, split: Split) -> None:
        """None: there is no text."""
        return None


class EmbeddingDataset(SequenceDataset):
    """The runs of one split."""

    def __init__(self, frames: FrameSet, split: Split, context: int, length: int) -> None:
        if length < context:
            raise ValueError(f"data.seq_len={length} must be at least the context of {context} frames: raise it")
        self.vectors_FD, self.seq_len, self.context = frames.vectors_FD, length, context
        self._set, self._split = frames, split
        pieces = frames.of(split, context + 1)
        if not pieces:
            raise ValueError(
                f"the {split} split of {frames.path!r} has no document of {context + 1} frames: add documents, or "
                f"raise {split}_fraction"
            )
        step = length - context + 1
        self.runs = [(start, piece) for piece in pieces for start in range(piece.start, piece.stop - context, step)]

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Sample:
        start, piece = self.runs[index]
        first, size = start - BEFORE, BEFORE + self.seq_len + AFTER
        low, high = max(first, piece.start), min(first + size, piece.stop)
        frames = torch.zeros(size, self.vectors_FD.shape[1])
        frames[low - first : high - first] = torch.from_numpy(self.vectors_FD[low:high])
        valid = torch.zeros(size, dtype=torch.bool)
        valid[low - first : high - first] = True
        return {"frames": frames, "valid": valid, "scored": torch.from_numpy(self._scored(start, piece))}

    def _scored(self, start: int, piece: Piece) -> np.ndarray:
        position = np.arange(self.seq_len)
        return (position >= self.context - 1) & (start + position + 1 < piece.stop)

    def fingerprint(self) -> str:
        """Hash of the vectors and the cut."""
        text = f"{self._set.fingerprint()} {self._split} {self.context} {self.seq_len}"
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def scored_tokens(self, indices: Sequence[int]) -> int:
        """Predictions."""
        return sum(int(self._scored(*self.runs[i]).sum()) for i in indices)

    def scored_bytes(self, indices: Sequence[int]) -> None:
        """None: there is no text."""
        return None


def _check_same_embedder(frames: FrameSet, other: FrameSet) -> None:
    if frames.dim != other.dim:
        raise ValueError(
            f"{other.path!r} has {other.dim} dimensions and {frames.path!r} {frames.dim}: embed both with one model"
        )
    if frames.embedder != other.embedder and UNKNOWN_EMBEDDER not in (frames.embedder, other.embedder):
        raise ValueError(
            f"{other.path!r} was embedded by the model {other.embedder} and {frames.path!r} by {frames.embedder}: "
            "embed both with one model"
        )


@rank_zero_only
def _report(found: Audit) -> None:
    log.info(found.line())
    for alarm in found.alarms():
        log.warning("warning: %s", alarm)
