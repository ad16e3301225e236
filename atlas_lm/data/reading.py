"""From a file to its documents: plain text, JSON lines and Parquet, also compressed.

Whatever a damaged file makes a decoder raise becomes one ValueError that names the file. A damaged file is found where
its format has checksums: always in .gz, in .zst unless they were turned off, in .parquet where its writer added them.
"""

import errno
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from atlas_lm.config.parsing import parse_json

WHOLE_FILE = (".txt", ".md")
READABLE = (*WHOLE_FILE, ".jsonl", ".parquet")
# Text in one of these encodings is no UTF-8, and its bytes are no text to any tokenizer. UTF-32's marks come first: one
# of them begins like one of UTF-16.
ENCODINGS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_documents(path: Path, text_field: str) -> Iterator[tuple[str, bytes]]:
    """(name, raw bytes) of each document of one file. ValueError naming the file, and the line or row if there is one.

    A .txt or .md file is one document, a .jsonl line and a .parquet row are one each.
    """
    suffix = suffix_of(path)
    try:
        with _open(path) as file:
            if suffix in WHOLE_FILE:
                yield str(path), _checked_encoding(path, file.read())
            elif suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", _json_text(f"{path}:{number}", line, text_field)
            else:
                yield from _parquet_texts(path, file, text_field)
    except OSError as error:
        raise ValueError(_cannot_read(path, error)) from error
    except (EOFError, zlib.error) as error:  # zlib.error is no OSError
        raise ValueError(_damaged(path, error)) from error


def suffix_of(path: Path) -> str:
    """The suffix below .gz and .zst."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


def text_bytes(where: str, value: object, text_field: str) -> bytes:
    """UTF-8 of a record's text. ValueError when it is no text, or holds a half surrogate pair."""
    if value is None:
        raise ValueError(f"{where}: {text_field!r} is NoneType, not text: give it a text, or leave it out")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {text_field!r} is {type(value).__name__}, not text: name another text_field")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text_field!r} cannot be written as UTF-8 ({error}): correct it") from error


def _cannot_read(path: Path, error: OSError) -> str:
    """Missing, forbidden, a failing disk; an OSError without such a number is a decoder's word for damage."""
    if error.errno in (None, errno.EINVAL):
        return _damaged(path, error)
    return f"cannot read {str(path)!r} ({error.strerror}): correct its path or its permissions"


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"cannot read {str(path)!r} ({reason}): it is damaged or cut off, copy it again"


def _checked_encoding(path: Path, raw: bytes) -> bytes:
    for mark, encoding in ENCODINGS.items():
        if raw.startswith(mark):
            raise ValueError(f"{str(path)!r} is {encoding}, not UTF-8: convert it, e.g. iconv -f {encoding} -t UTF-8")
    return raw


def _json_text(where: str, line: bytes, text_field: str) -> bytes:
    try:
        record = parse_json(line, where)
    except ValueError as error:
        raise ValueError(f"{error}: correct or remove the line") from error
    if not isinstance(record, dict) or text_field not in record:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: no field {text_field!r} in {keys}: set text_field or correct the line")
    return text_bytes(where, record[text_field], text_field)


def _parquet_texts(path: Path, file: IO[bytes], text_field: str) -> Iterator[tuple[str, bytes]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{str(path)!r} needs pyarrow: pip install 'atlas-lm[text]'") from error
    row = 0
    for values in _parquet_batches(path, file, text_field, pyarrow.parquet):
        for value in values:
            row += 1
            yield f"{path}: row {row}", text_bytes(f"{path}: row {row}", value, text_field)


def _parquet_batches(path: Path, file: IO[bytes], text_field: str, parquet: Any) -> Iterator[list[Any]]:
    """The values of the column, some rows at a time."""
    rows = 0
    try:
        table = parquet.ParquetFile(
            file if file.seekable() else io.BytesIO(file.read()), page_checksum_verification=True
        )
        names = table.schema_arrow.names
        if names.count(text_field) == 1:
            for batch in table.iter_batches(columns=[text_field]):
                values = batch.column(0).to_pylist()
                rows += len(values)
                yield values
            if rows != table.metadata.num_rows:
                raise EOFError(f"{rows} rows instead of {table.metadata.num_rows}")
            return
    except Exception as error:  # Arrow's own, but also OSError, OverflowError, UnicodeDecodeError: there is no end
        raise ValueError(_damaged(path, error)) from error
    what = f"several columns {text_field!r}" if text_field in names else f"no column {text_field!r}"
    raise ValueError(f"{path}: {what} in {names}: set text_field")


def _open(path: Path) -> IO[bytes]:
    if path.suffix not in (".gz", ".zst"):
        return path.open("rb")
    if path.stat().st_size == 0:  # gzip takes that for a compressed nothing, which has 20 bytes
        raise EOFError("it has 0 bytes")
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else io.BytesIO(_unzstd(path))


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
