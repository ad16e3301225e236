"""What is wrong with a set of embedded documents, counted before anything is trained on it (the seed's P0.1)."""

# F frames, D dimensions

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from atlas_lm.latent.frames import FrameSet

NEAR = 0.99  # cosine from which on two frames are the same text for most purposes
BLOCK = 2048  # frames compared at a time
ALARM = 0.01  # share of held-out frames near one of training above which it warns
FEW = 10  # held-out documents below which it warns: intervals resample documents


@dataclass(frozen=True)
class Audit:
    """The figures of one set."""

    documents: int
    frames: int
    coherence: float
    """Mean cosine of neighbouring frames."""
    order_errors: int
    """Windows of an npz that stand before one that they follow."""
    padded: int
    """Frames of zeros."""
    repeated: int
    """Frames equal to the one before."""
    too_short: int
    """Documents with fewer frames than a context and the one after it; left out."""
    near_duplicates: dict[str, int]
    """By held-out split: frames with a cosine of 0.99 or more to one of training."""
    held_out: dict[str, int]
    """By held-out split: frames."""
    held_out_documents: dict[str, int]
    """By held-out split: documents."""
    loose: int
    """Windows of an npz that do not continue the one before, of the same document."""
    windows: int
    """Of an npz."""

    def values(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """On one line."""
        near = ", ".join(f"{n} of {self.held_out[name]} {name} frames" for name, n in self.near_duplicates.items())
        return (
            f"audit: {self.documents} documents, {self.frames} frames; mean coherence {self.coherence:.3f}; "
            f"{self.order_errors} order errors, {self.padded} padded and {self.repeated} repeated frames; "
            f"{self.too_short} documents too short; near a training frame: {near or 'nothing is held out'}"
        )

    def alarms(self) -> list[str]:
        """What a reader has to know before believing a figure."""
        found = [
            f"{n / self.held_out[name]:.1%} of the {name} frames are near one of training: figures there are too good"
            for name, n in self.near_duplicates.items()
            if n > ALARM * self.held_out[name]
        ]
        if self.padded:
            found.append(f"{self.padded} frames are zeros: remove the padding")
        if self.order_errors:
            found.append(f"{self.order_errors} windows are out of order: they were sorted by target_indices")
        if self.loose > self.windows / 2:
            found.append(
                f"{self.loose} of {self.windows} windows do not continue the one before: give them in the order of the "
                "text, or target_indices; their frames count several times"
            )
        found += [
            f"the {name} split has {n} document{'s' * (n > 1)}, and intervals are over documents: add some, or raise "
            f"{name}_fraction="
            for name, n in self.held_out_documents.items()
            if 0 < n < FEW
        ]
        return found


def audit(found: FrameSet, least: int, other: FrameSet | None = None) -> Audit:
    """Of a set; `least`: frames that a document needs; `other`: an out-of-domain set to compare with training."""
    vectors = found.vectors_FD
    inner = np.ones(len(vectors), dtype=bool)  # frames with one before them in their piece
    for piece in found.pieces:
        inner[piece.start : piece.start + 1] = False
    at = np.flatnonzero(inner)
    cosines = np.einsum("fd,fd->f", vectors[at], vectors[at - 1])
    held = {split: found.documents(split, 0) for split in ("validation", "test")}
    sets = {name: np.concatenate(parts) for name, parts in held.items() if parts}
    if other is not None:
        sets["out-of-domain"] = other.vectors_FD
    training = found.documents("train", 0)
    train = np.concatenate(training) if training else vectors[:0]
    return Audit(
        documents=len({piece.document for piece in found.pieces}),
        frames=len(vectors),
        coherence=float(cosines.mean()) if len(at) else 0.0,
        order_errors=found.order_errors,
        padded=int((~vectors.any(axis=1)).sum()),
        repeated=int((vectors[at] == vectors[at - 1]).all(axis=1).sum()),
        too_short=sum(piece.stop - piece.start < least for piece in found.pieces),
        near_duplicates={name: near(held_out, train) for name, held_out in sets.items()},
        held_out={name: len(held_out) for name, held_out in sets.items()},
        held_out_documents={
            split: len({piece.document for piece in found.of(split, least)}) for split in ("validation", "test")
        },
        loose=found.loose,
        windows=found.windows,
    )


def near(held_out_FD: np.ndarray, train_FD: np.ndarray) -> int:
    """How many of the first have a cosine of at least 0.99 to one of the second."""
    count = 0
    if len(train_FD):
        for start in range(0, len(held_out_FD), BLOCK):
            best = np.full(len(held_out_FD[start : start + BLOCK]), -1.0, dtype=np.float32)
            for other in range(0, len(train_FD), BLOCK):
                cosines = held_out_FD[start : start + BLOCK] @ train_FD[other : other + BLOCK].T
                np.maximum(best, cosines.max(axis=1), out=best)
            count += int((best >= NEAR).sum())
    return count
