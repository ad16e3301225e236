"""Text files as a corpus: .txt, .md, .jsonl and .parquet, also compressed (.gz, .zst)."""

import glob
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from atlas_lm.data.packed import PackedSource, cut
from atlas_lm.data.source import Document, Split, check_fractions, split_of
from atlas_lm.data.tokenizers import Tokenizer

WHOLE_FILE = (".txt", ".md")
READABLE = (*WHOLE_FILE, ".jsonl", ".parquet")


class TextSource(PackedSource):
    """Files, named one by one or by glob patterns (`**` descends).

    A .txt or .md file is one document, a .jsonl line and a .parquet row are one each, taken from the field
    `text_field`. Documents of `files` go to a split by the hash of their content, so that equal documents never lie on
    both sides; with `validation_files` all of `files` is training text, and the test split is `test_files` or absent.
    `document_bytes` cuts longer documents at newlines first, which lets a single large file be split.

    ValueError: no match, unknown suffix, broken line or missing field (with file and line number), empty corpus.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        validation_files: str | Sequence[str] | None = None,
        test_files: str | Sequence[str] | None = None,
        tokenizer: str | Tokenizer = "bytes",
        text_field: str = "text",
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        document_bytes: int | None = None,
    ) -> None:
        super().__init__(tokenizer)
        check_fractions(validation_fraction, test_fraction)
        if document_bytes is not None and document_bytes < 1:
            raise ValueError(f"document_bytes={document_bytes} must be at least 1, or null to keep documents whole")
        if test_files and not validation_files:
            raise ValueError("test_files without validation_files: name both, or neither to split files by hash")
        self.files = find_files(files, "files")
        self.held_out: dict[Split, list[Path]] = {}
        if validation_files:
            self.held_out["validation"] = find_files(validation_files, "validation_files")
        if test_files:
            self.held_out["test"] = find_files(test_files, "test_files")
        self.text_field = text_field
        self.fractions = (validation_fraction, test_fraction)
        self.document_bytes = document_bytes

    def documents(self) -> Iterator[Document]:
        """All documents, files in the order of their paths; empty ones included."""
        for path in self.files:
            for document in self._of(path, "train"):
                split = document.split if self.held_out else split_of(document.raw, *self.fractions)
                yield Document(document.name, document.raw, split)
        for split, paths in self.held_out.items():
            for path in paths:
                yield from self._of(path, split)

    def _of(self, path: Path, split: Split) -> Iterator[Document]:
        for name, raw in read_documents(path, self.text_field):
            document = Document(name, raw, split)
            yield from cut(document, self.document_bytes) if self.document_bytes else (document,)


def find_files(patterns: str | Sequence[str], key: str) -> list[Path]:
    """The files that paths and globs name, each once, sorted. ValueError: nothing matches, or a suffix is unknown."""
    found: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        # A name that exists is taken as it is, even if it holds a [ or a *.
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matched = [Path(match) for match in matches if Path(match).is_file()]
        if not matched:
            raise ValueError(f"{key}: nothing matches {pattern!r} (seen from {Path.cwd()}): correct the path")
        found.update(matched)
    if not found:
        raise ValueError(f"{key} is empty: give paths or globs, e.g. data.source.{key}='[corpus/**/*.txt]'")
    for path in found:
        if _suffix(path) not in READABLE:
            raise ValueError(f"{key}: cannot read {str(path)!r}: use {', '.join(READABLE)}, these also as .gz or .zst")
    return sorted(found)


def read_documents(path: Path, text_field: str) -> Iterator[tuple[str, bytes]]:
    """(name, raw bytes) of each document of one file."""
    suffix = _suffix(path)
    try:
        with _open(path) as file:
            if suffix in WHOLE_FILE:
                yield str(path), file.read()
            elif suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", _json_text(f"{path}:{number}", line, text_field)
            else:
                yield from _parquet_texts(path, file, text_field)
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {str(path)!r} ({error}): it is damaged or cut off, copy it again") from error


def _json_text(where: str, line: bytes, text_field: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}): correct or remove the line") from error
    if not isinstance(record, dict) or text_field not in record:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no field {text_field!r} in {keys}: set text_field or correct the line")
    return text_bytes(where, record[text_field], text_field)


def text_bytes(where: str, value: object, text_field: str) -> bytes:
    """UTF-8 of a record's text. ValueError when it is no text, or holds a half surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {text_field!r} is {type(value).__name__}, not text: name another text_field")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text_field!r} cannot be written as UTF-8 ({error}): correct it") from error


def _parquet_texts(path: Path, file: IO[bytes], text_field: str) -> Iterator[tuple[str, bytes]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{str(path)!r} needs pyarrow: pip install 'atlas-lm[text]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
        if text_field not in table.schema_arrow.names:
            raise ValueError(f"{path}: no column {text_field!r} in {table.schema_arrow.names}: set text_field")
        row = 0
        for batch in table.iter_batches(columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield f"{path}: row {row}", text_bytes(f"{path}: row {row}", value, text_field)
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {str(path)!r} ({error}): it is damaged or no Parquet, copy it again") from error


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BytesIO(_unzstd(path))
    return path.open("rb")


def _unzstd(path: Path) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{str(path)!r} needs zstandard: pip install 'atlas-lm[text]'") from error
    # Frame by frame: the library's reader takes a file that ends inside a frame for a complete one.
    data, parts = path.read_bytes(), []
    try:
        while data:
            frame: Any = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(data))
            if not frame.eof:
                raise EOFError("the last frame is incomplete")
            data = frame.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    return b"".join(parts)
