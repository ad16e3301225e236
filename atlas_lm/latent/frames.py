"""Documents as sequences of unit vectors, one a frame: from an npz of windows, or a folder that `embed` has written."""

# N windows, C frames of a context, D dimensions, F frames

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atlas_lm.config.parsing import read_json
from atlas_lm.data.interfaces import UNKNOWN_EMBEDDER, Split, split_of
from atlas_lm.data.tokens import canonical, checksum, verify

AGAIN = "delete the folder and run python -m atlas_lm embed again"
FORMAT = "atlas-lm embeddings 1"
INDEX = "index.json"
NORM = 1e-2  # by how much the length of a vector may differ from 1: half precision keeps it within 1e-3
DOCUMENT_IDS = ("document_ids", "article_ids", "doc_ids")  # of an npz: one per window


class Piece(NamedTuple):
    """Consecutive frames of one document: vectors[start:stop]."""

    document: str
    split: Split
    start: int
    stop: int


@dataclass(frozen=True)
class FrameSet:
    """All documents of a set."""

    vectors_FD: np.ndarray  # float32, unit length
    pieces: tuple[Piece, ...]  # in the order of the file
    embedder: str  # hash of the model, or `UNKNOWN_EMBEDDER`
    path: str
    order_errors: int = 0  # windows of an npz that stand before one that they follow
    loose: int = 0  # windows of an npz that do not continue the one before, of the same document
    windows: int = 0  # of an npz

    @property
    def dim(self) -> int:
        """D."""
        return self.vectors_FD.shape[1]

    def of(self, split: Split | None, least: int) -> list[Piece]:
        """The pieces of a split (None: of all) with at least so many frames."""
        return [p for p in self.pieces if split in (None, p.split) and p.stop - p.start >= least]

    def documents(self, split: Split | None, least: int) -> list[np.ndarray]:
        """Their vectors, (F, D) each."""
        return [self.vectors_FD[p.start : p.stop] for p in self.of(split, least)]

    def fingerprint(self) -> str:
        """Hash of vectors, documents and splits."""
        digest = blake2b(np.ascontiguousarray(self.vectors_FD).view(np.uint8).data, digest_size=16)
        digest.update(repr([tuple(piece) for piece in self.pieces]).encode())
        return digest.hexdigest()


def read_frames(
    path: str | Path, context: int, validation_fraction: float, test_fraction: float, key: str = "data.source.path"
) -> FrameSet:
    """The set in a folder of `embed`, or an npz. Fractions: of an npz's documents, by the hash of their id. `key`: the
    setting that names it.

    An npz holds `contexts` (N, C, D), `targets` (N, D) and `document_ids` (N,), optionally `target_indices` (N,) and
    `embedder`. ValueError: nothing there, damaged, another shape, vectors that are not finite or of unit length.
    """
    path = Path(path)
    if path.is_dir():
        return _checked(_read_folder(path))
    if not path.exists() and path.suffix == ".npz":
        raise ValueError(f"{key}={str(path)!r} is not there: correct the path")
    if not path.exists():
        raise ValueError(
            f"{key}={str(path)!r} is not there: write it with python -m atlas_lm embed source=text files=... out={path}"
        )
    if path.suffix != ".npz":
        raise ValueError(f"{key}={str(path)!r} is neither a folder of embed nor an .npz: correct the path")
    return _checked(_read_npz(path, context, validation_fraction, test_fraction))


def _place(name: str, shape: tuple[int, ...], index: int) -> str:
    """As numpy writes it."""
    return f"{name}[{', '.join(str(i) for i in np.unravel_index(index, shape))}]"


def check_vectors(vectors_FD: np.ndarray, where: str, place: Callable[[int], str] = "number {}".format) -> None:
    """ValueError for the first vector that is not finite or not of unit length; `place`: what it is called."""
    lengths = np.linalg.norm(vectors_FD, axis=-1)
    wrong = np.flatnonzero(~np.isfinite(lengths))
    if len(wrong):
        raise ValueError(
            f"{where}: {len(wrong)} of {len(lengths)} vectors are not finite, the first is {place(wrong[0])}: "
            "embed the text again"
        )
    wrong = np.flatnonzero((np.abs(lengths - 1) > NORM) & (lengths > 0))  # zeros are padding, and the audit's to count
    if len(wrong):
        raise ValueError(
            f"{where}: {len(wrong)} of {len(lengths)} vectors are not of unit length, {place(wrong[0])} has "
            f"{lengths[wrong[0]]:.4g}: divide each by its length"
        )


def _checked(found: FrameSet) -> FrameSet:
    if not len(found.vectors_FD):
        raise ValueError(f"{found.path!r} holds no vectors: embed a text that has some")
    check_vectors(found.vectors_FD, repr(found.path))
    return found


# A folder of `embed`


def read_index(folder: Path) -> dict[str, Any]:
    """The content of index.json. ValueError: missing, unfinished, damaged, or of another format."""
    path = folder / INDEX
    if not path.is_file():
        unfinished = (folder / "settings.json").is_file()
        remedy = (
            "run the same embed command again, it resumes" if unfinished else "write them with python -m atlas_lm embed"
        )
        raise ValueError(f"no embeddings in {str(folder)!r}: {remedy}")
    try:
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): {AGAIN}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not of the format {FORMAT!r}: {AGAIN}")
    if index.pop("checksum", None) != checksum(canonical(index)):
        raise ValueError(f"{str(path)!r} is damaged (its checksum differs): {AGAIN}")
    return index


def _read_folder(folder: Path) -> FrameSet:
    index = read_index(folder)
    blocks, pieces, start = [], [], 0
    for part in index["parts"]:
        verify(folder, part["vectors"], AGAIN)
        block = np.frombuffer((folder / part["vectors"]["file"]).read_bytes(), dtype="<f4")
        blocks.append(block.reshape(-1, index["dim"]))
        for name, split, frames in part["documents"]:
            pieces.append(Piece(name, split, start, start + frames))
            start += frames
    vectors = np.concatenate(blocks) if blocks else np.empty((0, index["dim"]), np.float32)
    return FrameSet(vectors, tuple(pieces), index["embedder"]["hash"], str(folder))


# An npz of windows


def _read_npz(path: Path, context: int, validation_fraction: float, test_fraction: float) -> FrameSet:
    arrays = _arrays(path)
    contexts, targets, ids = arrays["contexts"], arrays["targets"], arrays["ids"]
    if contexts.shape[1] != context:
        raise ValueError(
            f"{str(path)!r}: contexts have {contexts.shape[1]} frames and data.source.context={context}: set it to "
            f"{contexts.shape[1]}"
        )
    for name, array in (("contexts", contexts), ("targets", targets)):
        check_vectors(array.reshape(-1, array.shape[-1]), repr(str(path)), partial(_place, name, array.shape[:-1]))
    order, errors = _order(ids, arrays.get("target_indices"))
    contexts, targets, ids = contexts[order], targets[order], ids[order]
    # a window continues the one before it where its context is that one's, moved on by the target
    continues = np.zeros(len(ids), dtype=bool)
    continues[1:] = ids[1:] == ids[:-1]
    continues[1:] &= (contexts[1:, :-1] == contexts[:-1, 1:]).all(axis=(1, 2))
    continues[1:] &= (contexts[1:, -1] == targets[:-1]).all(axis=1)
    starts = np.flatnonzero(~continues)
    stops = np.append(starts[1:], len(ids))
    parts, pieces, at = [], [], 0
    for first, last in zip(starts.tolist(), stops.tolist(), strict=True):
        parts += [contexts[first], targets[first:last]]
        name = str(ids[first])
        split = split_of(name.encode(), validation_fraction, test_fraction)
        pieces.append(Piece(name, split, at, at + context + last - first))
        at = pieces[-1].stop
    embedder = str(arrays.get("embedder", UNKNOWN_EMBEDDER))
    loose = int((ids[1:] == ids[:-1]).sum() - continues.sum())
    vectors = np.concatenate(parts).astype(np.float32)
    return FrameSet(vectors, tuple(pieces), embedder, str(path), errors, loose, len(ids))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that are read, by our names. ValueError naming what is wrong with them."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            there = set(file.files)
            ids = next((name for name in DOCUMENT_IDS if name in there), None)
            missing = [name for name in ("contexts", "targets") if name not in there]
            if missing or ids is None:
                missing += [] if ids else ["document_ids"]
                raise _Wrong(f"has no {' and no '.join(missing)}, only {', '.join(sorted(there)) or 'nothing'}")
            found = {"contexts": file["contexts"], "targets": file["targets"], "ids": file[ids]}
            found |= {name: file[name] for name in ("target_indices", "embedder") if name in there}
    except _Wrong as error:
        raise ValueError(f"{str(path)!r} {error}: save these arrays") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} cannot be read as an npz of numbers ({reason}): save it again") from error
    _check_shapes(path, found)
    return found


class _Wrong(Exception):
    """What an npz lacks."""


def _check_shapes(path: Path, arrays: dict[str, np.ndarray]) -> None:
    contexts, targets, ids = arrays["contexts"], arrays["targets"], arrays["ids"]
    for name, array, axes in (("contexts", contexts, 3), ("targets", targets, 2), ("document ids", ids, 1)):
        if array.ndim != axes:
            raise ValueError(f"{str(path)!r}: {name} are {array.shape} and must have {axes} axes: save them so")
    for name, array in (("contexts", contexts), ("targets", targets)):
        if array.dtype.kind != "f":
            raise ValueError(f"{str(path)!r}: {name} are of {array.dtype} and must be of float32: convert them")
    if contexts.shape[2] != targets.shape[1]:
        raise ValueError(
            f"{str(path)!r}: contexts have {contexts.shape[2]} dimensions and targets {targets.shape[1]}: embed both "
            "with one model"
        )
    lengths = {len(arrays[name]) for name in ("contexts", "targets", "ids", "target_indices") if name in arrays}
    if len(lengths) > 1:
        raise ValueError(f"{str(path)!r}: its arrays have {sorted(lengths)} rows: save one of each for every window")
    if lengths == {0}:
        raise ValueError(f"{str(path)!r} holds no windows: save some")


def _order(ids: np.ndarray, indices: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Windows by document, in the order in which the documents first come, and within one by index; how many windows
    of a document stand before one that they follow."""
    _, first, number = np.unique(ids, return_index=True, return_inverse=True)
    place = first[number]
    within = np.arange(len(ids)) if indices is None else indices
    order = np.lexsort((within, place))
    by_document = np.argsort(place, kind="stable")
    same, ahead = np.diff(place[by_document]) == 0, np.diff(within[by_document].astype(np.int64)) <= 0
    return order, int((same & ahead).sum())


def check_documents(pieces: Sequence[Piece], frames: int, where: str, embedded: bool = True) -> None:
    """ValueError: no document is long enough for a context and the frame after it, or there is one document alone.

    `embedded`: they come from a text, which can be cut.
    """
    long = {piece.document for piece in pieces if piece.stop - piece.start >= frames}
    if not long:
        longest = max((piece.stop - piece.start for piece in pieces), default=0)
        raise ValueError(
            f"{where}: every document is shorter than a context and the frame after it, {frames} frames; the longest "
            f"has {longest}: embed longer documents or smaller units"
        )
    if len({piece.document for piece in pieces}) == 1:
        cut = ", or embed it with document_bytes=, which cuts it, and another out=" if embedded else ""
        raise ValueError(
            f"{where} holds one document, {pieces[0].document!r}, and the split is by document: add others{cut}"
        )
