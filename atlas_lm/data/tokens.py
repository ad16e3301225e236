"""Token shards on disk, as `prepare` writes them, memory-mapped.

index.json            sizes, checksums, tokenizer hash; written last, so its presence means that all is there
tokenizer.json        absent for bytes
train-00000.tokens    uint16 (uint32 above 65536 ids), little-endian
validation-00000.tokens, .raw (the documents' bytes), .lengths (uint32 raw bytes per token); test likewise
"""

import json
import math
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from atlas_lm.config.parsing import read_json
from atlas_lm.data.interfaces import SPLITS, Split
from atlas_lm.data.losses import Losses, check_losses
from atlas_lm.data.packed import HeldOutBytes, PackedDataset, TokenStream, byte_ends
from atlas_lm.data.remote import RemoteShards, default_cache, is_remote
from atlas_lm.data.shard_overlap import compare_splits
from atlas_lm.data.tokenizers import Tokenizer, load_tokenizer
from atlas_lm.files import write_atomically

FORMAT = "atlas-lm tokens 1"
AGAIN = "delete the folder and run python -m atlas_lm prepare again"


class FileEntry(TypedDict):
    """One file of a split."""

    file: str
    size: int  # bytes
    blake2b: str


class SplitEntry(TypedDict):
    """One split; the lists are in the order of the stream. Shards of older versions do not know their losses."""

    tokens: int
    bytes: int  # raw bytes that the tokens stand for
    token_files: list[FileEntry]
    raw_files: list[FileEntry]
    length_files: list[FileEntry]
    losses: NotRequired[dict[str, Any]]


class ShardedArray:
    """Files of one dtype, read by slices as if they were one array; (n,) little-endian unsigned."""

    def __init__(self, paths: Sequence[Path], dtype: str) -> None:
        self._paths = list(paths)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        sizes = [path.stat().st_size // self._dtype.itemsize for path in self._paths]
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice, /) -> np.ndarray:
        first, last, step = where.indices(len(self))
        assert step == 1
        parts = []
        shard = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < last:
            start, end = int(self._starts[shard]), int(self._starts[shard + 1])
            parts.append(self._map(shard)[first - start : min(last, end) - start])
            first, shard = min(last, end), shard + 1
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self._dtype)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._paths[shard], dtype=self._dtype, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a pickled map would carry the whole file to each worker


class TokensSource:
    """Shards written by `python -m atlas_lm prepare`.

    `path`: their folder, or an address of fsspec (s3://…), which `setup` copies into a folder below `cache`. All
    checksums are verified in `setup`, which reads every file once (about a second per GB).
    ValueError: no index, a damaged or missing file, another tokenizer than the shards were written with.
    """

    def __init__(self, path: str, cache: str | None = None) -> None:
        self._remote = RemoteShards(path, Path(cache) if cache else default_cache()) if is_remote(path) else None
        self._folder = Path(path) if self._remote is None else self._remote.folder
        self._again = AGAIN if self._remote is None else self._remote.remedy
        self._index = read_index(self._folder, self._again)
        if self._remote is not None and self._index["tokenizer_json"]:
            self._remote.fetch_small("tokenizer.json")
        own = self._folder / "tokenizer.json"
        if self._index["tokenizer_json"] and not own.is_file():
            raise ValueError(f"{str(own)!r} is missing: {self._again}")
        self._tokenizer = load_tokenizer(str(own) if self._index["tokenizer_json"] else "bytes")
        if self._tokenizer.fingerprint() != self._index["tokenizer"]:
            raise ValueError(f"{str(own)!r} is not the tokenizer that wrote these shards: {self._again}")
        self._streams: dict[Split, TokenStream] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._tokenizer.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the shards."""
        return self._tokenizer

    def setup(self) -> None:
        """Verify and map all shards, once."""
        if not self._streams:
            if self._remote is not None:
                self._remote.fetch([file for split in SPLITS for file in _files(self._index["splits"][split])])
            streams: dict[Split, TokenStream] = {split: self._stream(split) for split in SPLITS}
            check_losses({split: stream.losses for split, stream in streams.items() if stream.losses})
            self._streams = streams if self._index.get("splits_compared") else compare_splits(streams)

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
        """What the tokenizer has lost of a split; None where an older version wrote the shards."""
        self.setup()
        return self._streams[split].losses

    def _stream(self, split: Split) -> TokenStream:
        entry: SplitEntry = self._index["splits"][split]
        for file in _files(entry):
            verify(self._folder, file, self._again)
        digest = blake2b(key=self._tokenizer.fingerprint().encode(), digest_size=16)
        for file in entry["token_files"]:
            digest.update(file["blake2b"].encode())
        held_out = None
        if split != "train":
            raw = b"".join((self._folder / file["file"]).read_bytes() for file in entry["raw_files"])
            lengths = ShardedArray([self._folder / file["file"] for file in entry["length_files"]], "uint32")
            held_out = HeldOutBytes(raw, byte_ends(lengths[:]))
        tokens = ShardedArray([self._folder / file["file"] for file in entry["token_files"]], self._index["dtype"])
        assert len(tokens) == entry["tokens"]
        losses = Losses(**entry["losses"]) if "losses" in entry else None
        return TokenStream(tokens, self._tokenizer.separator_id, entry["bytes"], digest.hexdigest(), held_out, losses)


def _files(entry: SplitEntry) -> list[FileEntry]:
    return [*entry["token_files"], *entry["raw_files"], *entry["length_files"]]


def read_index(folder: Path, again: str = AGAIN) -> dict[str, Any]:
    """The content of index.json. ValueError, with the remedy `again`: missing, damaged, or of another format."""
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"no token shards in {str(folder)!r}: write them with python -m atlas_lm prepare")
    try:
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): {again}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not of the format {FORMAT!r}: {again}")
    if index.pop("checksum", None) != checksum(canonical(index)):
        raise ValueError(f"{str(path)!r} is damaged (its checksum differs): {again}")
    return index


def verify(folder: Path, entry: FileEntry, again: str = AGAIN) -> None:
    """ValueError, with the remedy `again`, unless the file is there with the size and content that the index has."""
    path = folder / entry["file"]
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing: {again}")
    if path.stat().st_size != entry["size"]:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes instead of {entry['size']}: {again}")
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != entry["blake2b"]:
        raise ValueError(f"{str(path)!r} is damaged (its checksum differs): {again}")


def write_durably(path: Path, data: bytes) -> FileEntry:
    """Write under a temporary name, sync, rename: the file is there whole or not at all, also after a power cut."""
    write_atomically(path, data, own=True)
    return {"file": path.name, "size": len(data), "blake2b": checksum(data)}


def canonical(value: object) -> bytes:
    """JSON that is equal for equal values."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def checksum(data: bytes) -> str:
    """blake2b, 128 bits."""
    return blake2b(data, digest_size=16).hexdigest()
