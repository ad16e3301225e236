"""Write the embeddings of a text's passages into a folder for `data=embeddings`; a killed one resumes where it was.

The result has the same bytes as an uninterrupted run: passages are embedded in blocks, and a block is either there,
with the hash of its text, or is embedded again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from atlas_lm.config.parsing import read_json
from atlas_lm.data.interfaces import Document, EmptyDocuments
from atlas_lm.data.overlap import Overlap, content_key
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.sources import build_source
from atlas_lm.data.tokens import canonical, checksum, verify, write_durably
from atlas_lm.files import write_atomically
from atlas_lm.latent.audit import Audit, audit
from atlas_lm.latent.embedder import Embedder
from atlas_lm.latent.frames import AGAIN, FORMAT, INDEX, check_documents, read_frames, read_index
from atlas_lm.latent.passages import UNITS, passages

log = logging.getLogger(__name__)

SETTINGS, AUDIT = "settings.json", "audit.json"
LEAST = 6  # frames of a document that the audit counts as long enough: the usual context and the next one


class Written(NamedTuple):
    """What `embed` returns."""

    folder: Path
    audit: Audit
    frames: dict[str, int]  # by split
    cut_short: int  # passages longer than the model reads


def embed(
    source: str,
    out: str | Path,
    model: str,
    unit: str = "paragraph",
    min_chars: int = 40,
    max_chars: int = 1000,
    block: int = 512,
    batch: int = 32,
    **options: Any,
) -> Written:
    """Embed every document of a text source, passage by passage.

    source       stdlib, text or hf; further options are its own (conf/data/<source>.yaml explains them)
    out          folder to write to
    model        folder or name of a sentence-transformers model
    unit         what becomes a frame: paragraph, line or sentence
    min_chars    characters below which a passage is joined to the next
    max_chars    characters above which a passage is cut after sentences; 256 tokens are about 1,000
    block        passages embedded before they are written: what a killed run has to repeat
    batch        passages that the model reads at a time

    ValueError: bad arguments, no text, a folder that holds something else or was begun by another model.
    """
    if unit not in UNITS:
        raise ValueError(f"unit={unit} must be one of {', '.join(UNITS)}")
    if not 0 <= min_chars < max_chars:
        raise ValueError(f"min_chars={min_chars} must be at least 0 and below max_chars={max_chars}")
    for name, value in (("block", block), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    text, folder = build_source(source, options), Path(out)
    embedder = Embedder(model, batch)
    settings = {
        "source": source, "options": options, "unit": unit, "min_chars": min_chars, "max_chars": max_chars,
        "block": block, "embedder": {"name": model, "hash": embedder.hash},
    }  # fmt: skip
    unfinished = _begin(folder, settings)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("passages"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        cutter = _Cutter(text, unit, min_chars, max_chars)
        corpus, total = cutter.read()
        if not total:
            raise ValueError(f"source={source} holds no text: every document is empty, or there is none")
        if unfinished:
            task = progress.add_task("embedding", total=total)
            parts = []
            for number, documents in enumerate(cutter.blocks(block)):
                parts.append(_part(folder, number, documents, embedder))
                progress.advance(task, sum(len(document.passages) for document in documents))
            _finish(folder, {**settings, "corpus": corpus}, parts)
        elif read_index(folder)["corpus"] != corpus:
            raise ValueError(f"the corpus changed since {str(folder)!r} was written: choose another out=, or {AGAIN}")
        else:
            log.info("%s is complete already: nothing to embed", folder)
    cutter.report()
    return _audited(folder)


class _Cut(NamedTuple):
    """A document, or a part of one that is longer than a block, in passages."""

    name: str
    split: str
    passages: list[str]


class _Cutter:
    """The documents of a source in passages, in the same order each time."""

    def __init__(self, source: PackedSource, unit: str, min_chars: int, max_chars: int) -> None:
        self.source, self.rule = source, (unit, min_chars, max_chars)
        self.overlap, self.empty = Overlap(source.splits_are_drawn), EmptyDocuments(source.empty_documents)

    def read(self) -> tuple[str, int]:
        """Hash of all documents and their splits, and how many passages they have."""
        digest = blake2b(digest_size=16)
        for document in self.source.documents():
            self.overlap.note(document.split, content_key(document.raw))
            self.empty.note(document)
            digest.update(f"{document.split} {len(document.raw)}\n".encode() + document.raw)
        return digest.hexdigest(), sum(len(document.passages) for document in self._documents())

    def report(self) -> None:
        """Log what was left out."""
        self.empty.report()
        self.overlap.report()

    def blocks(self, size: int) -> Iterator[list[_Cut]]:
        """Whole documents, until they have so many passages."""
        block: list[_Cut] = []
        for document in self._documents():
            block.append(document)
            if sum(len(d.passages) for d in block) >= size:
                yield block
                block = []
        if block:
            yield block

    def _documents(self) -> Iterator[_Cut]:
        for document in self.overlap.remaining(self.source.documents()):
            found = passages(_decoded(document), *self.rule)
            if found:
                yield _Cut(document.name, document.split, found)


def _decoded(document: Document) -> str:
    try:
        return document.raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{document.name} is not UTF-8 (byte {error.start}): convert it") from None


def _begin(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether there is something left to write. ValueError when the folder holds anything but these very vectors."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file: choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():
        _check_settings(folder, read_index(folder)["settings"], settings, "written")
        return False
    marker = folder / SETTINGS
    if not marker.exists():
        if any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty and was not written by embed: choose another out=")
        write_durably(marker, canonical(settings))
    else:
        _check_settings(folder, read_json(marker), settings, "begun")
    return True


def _check_settings(folder: Path, then: dict[str, Any], now: dict[str, Any], what: str) -> None:
    now = json.loads(canonical(now))
    before, after = then.get("embedder", {}), now["embedder"]
    if before.get("hash") != after["hash"]:
        raise ValueError(
            f"{str(folder)!r} was {what} by the model {before.get('hash')} ({before.get('name')}), and "
            f"model={after['name']} is {after['hash']}: choose another out=, or the model of then"
        )
    for name in now:
        if name != "embedder" and then.get(name) != now[name]:
            raise ValueError(
                f"{str(folder)!r} was {what} with {name}={then.get(name)}, not {now[name]}: choose another out=, or "
                "set it back"
            )


def _part(folder: Path, number: int, documents: list[_Cut], embedder: Any) -> dict[str, Any]:
    """Embed a block and write it, then its manifest; with the manifest already there check the block against it."""
    digest = blake2b(canonical([list(document) for document in documents]), digest_size=16).hexdigest()
    manifest = folder / f"part-{number:05d}.json"
    if manifest.exists():
        part = read_json(manifest)
        if part["block"] != digest:
            raise ValueError(f"the corpus changed since {str(folder)!r} was begun: delete the folder and run again")
        verify(folder, part["vectors"], AGAIN)
        return part
    texts = [text for document in documents for text in document.passages]
    vectors = embedder.encode(texts)
    part = {
        "block": digest,
        "dim": int(vectors.shape[1]),
        "cut_short": embedder.cut_short(texts),
        "documents": [[document.name, document.split, len(document.passages)] for document in documents],
        "vectors": write_durably(folder / f"part-{number:05d}.f32", vectors.astype("<f4").tobytes()),
    }
    write_durably(manifest, canonical(part))
    return part


def _finish(folder: Path, settings: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Write index.json, the sign that everything is there, and remove what only an interrupted run needs."""
    corpus = settings.pop("corpus")
    index = {
        "format": FORMAT, "settings": settings, "embedder": settings["embedder"], "corpus": corpus,
        "dim": parts[0]["dim"], "parts": parts,
    }  # fmt: skip
    write_durably(folder / INDEX, canonical({**index, "checksum": checksum(canonical(index))}))
    for path in (*folder.glob("part-*.json"), *folder.glob("*.tmp"), folder / SETTINGS):
        path.unlink(missing_ok=True)


def _audited(folder: Path) -> Written:
    found = read_frames(folder, LEAST - 1, 0.0, 0.0)
    check_documents(found.pieces, LEAST, repr(str(folder)))
    figures = audit(found, LEAST)
    write_atomically(folder / AUDIT, json.dumps(figures.values(), indent=2) + "\n")
    frames: dict[str, int] = {}
    for piece in found.pieces:
        frames[piece.split] = frames.get(piece.split, 0) + piece.stop - piece.start
    return Written(folder, figures, frames, sum(part["cut_short"] for part in read_index(folder)["parts"]))
