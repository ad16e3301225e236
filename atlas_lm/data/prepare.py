"""Tokenize a corpus once and write it to shards for `data=tokens`, so that a killed one resumes where it was.

The result has the same bytes as an uninterrupted run, whatever was interrupted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from atlas_lm.config.parsing import read_json
from atlas_lm.data.interfaces import SPLITS, Document, EmptyDocuments
from atlas_lm.data.losses import Losses, check_losses
from atlas_lm.data.overlap import Overlap, content_key
from atlas_lm.data.packed import PackedSource, Packer, token_dtype
from atlas_lm.data.sources import build_source
from atlas_lm.data.tokenizers import JsonTokenizer, Tokenizer, load_tokenizer, tokenizer_path, train_bpe
from atlas_lm.data.tokens import AGAIN, FORMAT, SplitEntry, canonical, checksum, read_index, verify, write_durably

MAX_VOCABULARY = 1 << 31


def prepare(
    source: str,
    out: str | Path,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    block_mb: float = 64,
    **options: Any,
) -> Path:
    """Write shards and index.json into `out` and return it.

    source       stdlib, text or hf; further options are its own (conf/data/<source>.yaml explains them)
    out          folder to write to
    tokenizer    bytes, python, the path of a tokenizer.json, or bpe: trained on the training split
    vocab_size   ids of a bpe tokenizer
    block_mb     raw text per shard of a split, MB; a block is what a killed run has to repeat

    ValueError: bad arguments, bad documents (all are read once before the first is encoded), a folder that holds
    something else, or a corpus that is not the one an interrupted run began with.
    """
    if (tokenizer == "bpe") != (vocab_size is not None):
        raise ValueError(
            f"tokenizer={tokenizer} with vocab_size={vocab_size}: bpe needs a vocab_size, no other has one"
        )
    if not 0 < block_mb < math.inf:
        raise ValueError(f"block_mb={block_mb} must be above 0; 64 is usual")
    if vocab_size is not None and vocab_size > MAX_VOCABULARY:
        raise ValueError(f"vocab_size={vocab_size} is above {MAX_VOCABULARY}: 4096 to 65536 are usual")
    chosen_source = build_source(source, options)
    folder = Path(out)
    settings = {
        "source": source, "options": options, "vocab_size": vocab_size, "block_mb": block_mb,
        "tokenizer": "bpe" if tokenizer == "bpe" else load_tokenizer(tokenizer).fingerprint(),
    }  # fmt: skip
    unfinished = _begin(folder, settings)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:  # fmt: skip
        read = _read(chosen_source, progress)
        if not unfinished:
            if read_index(folder).get("corpus", read.digest) != read.digest:
                raise ValueError(
                    f"the corpus changed since {str(folder)!r} was written: choose another out=, or {AGAIN}"
                )
            return folder

        def documents() -> Iterator[Document]:
            return read.overlap.remaining(chosen_source.documents())

        chosen = _tokenizer(folder, tokenizer, vocab_size, documents)
        writing = progress.add_task("writing", total=read.n_bytes)
        parts = []
        for number, block in enumerate(_blocks(documents(), int(block_mb * 1e6))):
            parts.append(_part(folder, number, block, chosen))
            progress.advance(writing, sum(len(document.raw) for document in block))
    read.overlap.report()
    _finish(folder, {**settings, "corpus": read.digest}, chosen, parts)
    return folder


class _Read(NamedTuple):
    """What one pass over a corpus finds."""

    n_bytes: int
    overlap: Overlap
    digest: str  # of all documents and their splits


def _read(source: PackedSource, progress: Progress) -> _Read:
    task, digest = progress.add_task("reading", total=None), blake2b(digest_size=16)
    n_bytes, overlap, empty = 0, Overlap(source.splits_are_drawn), EmptyDocuments(source.empty_documents)
    for document in source.documents():
        n_bytes += len(document.raw)
        overlap.note(document.split, content_key(document.raw))
        empty.note(document)
        digest.update(f"{document.split} {len(document.raw)}\n".encode() + document.raw)
        progress.update(task, completed=n_bytes)
    progress.update(task, total=n_bytes)
    empty.report()
    return _Read(n_bytes, overlap, digest.hexdigest())


def _begin(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether there is something left to write. ValueError when the folder holds anything but this very corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "index.json").exists():
        if canonical(read_index(folder)["settings"]) != canonical(settings):
            raise ValueError(f"{str(folder)!r} holds shards written with other settings: choose another out=")
        _remove_leftovers(folder)
        return False
    marker = folder / "settings.json"
    if not marker.exists():
        if any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty and was not written by prepare: choose another out=")
        write_durably(marker, canonical(settings))
    elif marker.read_bytes() != canonical(settings):
        raise ValueError(f"{str(folder)!r} was begun with other settings: use the same ones, or delete the folder")
    return True


def _tokenizer(
    folder: Path, spec: str, vocab_size: int | None, documents: Callable[[], Iterator[Document]]
) -> Tokenizer:
    """The tokenizer, its tokenizer.json written to the folder if it has one."""
    if spec == "bytes":
        return load_tokenizer(spec)
    path = folder / "tokenizer.json"
    if not path.exists():
        if spec == "bpe":
            assert vocab_size is not None
            text = train_bpe((d.raw for d in documents() if d.split == "train"), vocab_size).to_str()
            write_durably(path, text.encode())
        else:
            write_durably(path, tokenizer_path(spec).read_bytes())
    found = JsonTokenizer(path)
    if spec != "bpe" and found.fingerprint() != load_tokenizer(spec).fingerprint():
        raise ValueError(f"{str(path)!r} is not {spec!r}, which this folder was begun with: {AGAIN}")
    return found


def _blocks(documents: Iterator[Document], block_bytes: int) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.raw)
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def _part(folder: Path, number: int, block: list[Document], tokenizer: Tokenizer) -> dict[str, SplitEntry]:
    """Write one shard per split, then a manifest; with the manifest already there only check the block against it."""
    digest = blake2b(digest_size=16)
    for document in block:
        digest.update(f"{document.split} {len(document.raw)}\n".encode() + document.raw)
    manifest = folder / f"part-{number:05d}.json"
    if manifest.exists():
        part = _read_part(manifest)
        if part["block"] != digest.hexdigest():
            raise ValueError(f"the corpus changed since {str(folder)!r} was begun: delete the folder and run again")
        for entry in part["splits"].values():
            for file in (*entry["token_files"], *entry["raw_files"], *entry["length_files"]):
                verify(folder, file)
        return part["splits"]
    splits: dict[str, SplitEntry] = {}
    for split in SPLITS:
        packer = Packer(tokenizer, keep_raw=split != "train")
        for document in block:
            if document.split == split:
                packer.add(document)
        splits[split] = _write_split(folder / f"{split}-{number:05d}", packer)
    write_durably(manifest, canonical({"block": digest.hexdigest(), "splits": splits}))
    return splits


def _read_part(manifest: Path) -> dict[str, Any]:
    """The manifest of a part that an interrupted run has finished. ValueError naming it: it is damaged."""
    try:
        part = read_json(manifest)
        entries = [part["splits"][split] for split in SPLITS]
        files = [file for entry in entries for kind in ("token", "raw", "length") for file in entry[f"{kind}_files"]]
        if isinstance(part["block"], str) and all({"file", "size", "blake2b"} <= set(file) for file in files):
            return part
        reason = "entries are missing"
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{str(manifest)!r} is damaged ({reason}): {AGAIN}")


def _write_split(stem: Path, packer: Packer) -> SplitEntry:
    tokens, raw, lengths, n_bytes = packer.arrays()
    data = {
        "tokens": tokens.astype(tokens.dtype.newbyteorder("<")).tobytes(),
        "raw": raw,
        "lengths": lengths.astype("<u4").tobytes(),
    }
    files = {
        kind: [write_durably(stem.with_name(f"{stem.name}.{kind}"), content)] if content else []
        for kind, content in data.items()
    }
    return {
        "tokens": len(tokens),
        "bytes": n_bytes,
        "token_files": files["tokens"],
        "raw_files": files["raw"],
        "length_files": files["lengths"],
        "losses": asdict(packer.losses),
    }


def _finish(
    folder: Path, settings: dict[str, Any], tokenizer: Tokenizer, parts: Sequence[dict[str, SplitEntry]]
) -> None:
    """Write index.json, the sign that everything is there, and remove what only an interrupted run needs."""
    if not any(part[split]["tokens"] for part in parts for split in SPLITS):
        raise ValueError("the corpus is empty: there is no document, or all of them are empty")
    corpus = settings.pop("corpus")
    splits = {split: _joined([part[split] for part in parts]) for split in SPLITS}
    check_losses({split: Losses(**entry["losses"]) for split, entry in splits.items() if "losses" in entry})
    index: dict[str, Any] = {
        "format": FORMAT,
        "splits_compared": True,
        "settings": settings,
        "corpus": corpus,
        "tokenizer": tokenizer.fingerprint(),
        "tokenizer_json": isinstance(tokenizer, JsonTokenizer),
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).__name__,
        "splits": splits,
    }
    write_durably(folder / "index.json", canonical({**index, "checksum": checksum(canonical(index))}))
    _remove_leftovers(folder)


def _joined(entries: Sequence[SplitEntry]) -> SplitEntry:
    joined: SplitEntry = {
        "tokens": sum(entry["tokens"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "token_files": [file for entry in entries for file in entry["token_files"]],
        "raw_files": [file for entry in entries for file in entry["raw_files"]],
        "length_files": [file for entry in entries for file in entry["length_files"]],
    }
    if all("losses" in entry for entry in entries):  # a part may be of an older version
        joined["losses"] = asdict(sum((Losses(**entry["losses"]) for entry in entries), Losses()))
    return joined


def _remove_leftovers(folder: Path) -> None:
    for path in (*folder.glob("part-*.json"), *folder.glob("*.tmp"), folder / "settings.json"):
        path.unlink(missing_ok=True)
