"""A Hugging Face dataset as a corpus, by name or from disk."""

import logging
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from atlas_lm.data.interfaces import SPLITS, Document, Split, check_fractions, split_of
from atlas_lm.data.losses import Losses
from atlas_lm.data.overlap import content_key
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.reading import text_bytes
from atlas_lm.data.streams import TextStream
from atlas_lm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)


class HuggingFaceSource(PackedSource):
    """The rows of a dataset, one document each, taken from the column `text_field`.

    `path` is a name on the hub, a folder of data files, or a folder written by `save_to_disk`. Where the dataset names
    no validation split, the rows of `train_split` go to the splits by the hash of their content.

    With `streaming` rows are read while the model trains, block by block, and never all held (`streams.py`); the
    reader's own state travels in the checkpoint. Held-out text is that of the first `held_out_documents` rows of its
    split, and no row of the same content is trained on. With `max_documents` only so many rows of each split are
    downloaded, and kept in memory like any other corpus. `chunksize` is the library's: bytes of JSON lines or text, or
    rows of CSV, that are read at once (None: 10 MB, 10,000 rows), which decides how much memory a stream takes.

    ValueError: `datasets` is not installed, nothing at `path`, unknown split or column, a row without text.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        streaming: bool = False,
        max_documents: int | None = None,
        tokenizer: str | Tokenizer = "bytes",
        text_field: str = "text",
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        held_out_documents: int = 10_000,
        chunksize: int | None = None,
    ) -> None:
        super().__init__(tokenizer)
        check_fractions(validation_fraction, test_fraction)
        if held_out_documents < 1:
            raise ValueError(f"held_out_documents={held_out_documents} must be at least 1")
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"chunksize={chunksize} must be at least 1, or null for the library's own")
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"max_documents={max_documents} must be at least 1, or null for all rows")
        if test_split and not validation_split:
            raise ValueError(f"test_split={test_split!r} without validation_split: name both, or neither to split rows")
        named = [split for split in (train_split, validation_split, test_split) if split]
        for split in named:
            if named.count(split) > 1:
                raise ValueError(
                    f"train_split={train_split}, validation_split={validation_split}, test_split={test_split}: "
                    f"{split!r} is named twice, so what is held out would be trained on: name different splits, "
                    "or no validation_split to hold out a part by hash"
                )
        self.splits_are_drawn = validation_split is None
        self.path, self.name = path, name
        self.splits: dict[Split, str | None] = dict(
            zip(SPLITS, (train_split, validation_split, test_split), strict=True)
        )
        self.streaming, self.max_documents = streaming, max_documents
        self.text_field = text_field
        self.fractions = (validation_fraction, test_fraction)
        self.held_out_documents = held_out_documents
        self._reading = {} if chunksize is None else {"chunksize": chunksize}

    @property
    def streams(self) -> bool:
        """Whether training reads the rows on the fly."""
        return self.streaming and self.max_documents is None

    def documents(self) -> Iterator[Document]:
        """The rows in the dataset's order, split by split."""
        by_hash = self.splits["validation"] is None
        for split, theirs in self.splits.items():
            if theirs is None:
                continue
            for number, row in enumerate(self._rows(theirs)):
                raw = self._text(theirs, number, row)
                found = split_of(raw, *self.fractions) if by_hash else split
                yield Document(f"{self.path} [{theirs}] row {number}", raw, found)

    def documents_in_memory(self) -> Iterator[Document]:
        """All of them, or the held-out text of a stream."""
        if not self.streams:
            yield from self.documents()
            return
        by_hash = self.splits["validation"] is None
        for split, theirs in self.splits.items():
            if theirs is None or (split == "train" and not by_hash):
                continue
            for number, row in enumerate(islice(self._rows(theirs), self.held_out_documents)):
                raw = self._text(theirs, number, row)
                found = split_of(raw, *self.fractions) if by_hash else split
                if found != "train":
                    yield Document(f"{self.path} [{theirs}] row {number}", raw, found)

    def _text(self, split: str, number: int, row: dict[str, Any]) -> bytes:
        where = f"{self.path} [{split}] row {number}"
        if self.text_field not in row:
            raise ValueError(f"{where}: no column {self.text_field!r} in {sorted(row)}: set text_field")
        return text_bytes(where, row[self.text_field], self.text_field)

    def exclude(self, keys: frozenset[bytes]) -> int:
        """As of any source; of a stream nobody knows how many there are."""
        if self.streams:
            self._excluded |= keys
            return 0
        return super().exclude(keys)

    def losses(self, split: Split) -> Losses | None:
        """What the tokenizer loses of a split; None of a stream, which is not read before it is trained on."""
        return None if self.streams and split == "train" else super().losses(split)

    def stream(self, seq_len: int, seed: int) -> TextStream:
        """The training sequences of `streaming`."""
        theirs = self.splits["train"]
        assert theirs is not None
        by_hash = self.splits["validation"] is None
        held_out = self.held_out_keys() | self._excluded

        def text_of(number: int, row: Any) -> bytes | None:
            raw = self._text(theirs, number, row)
            if by_hash and split_of(raw, *self.fractions) != "train":
                return None
            return None if content_key(raw) in held_out else raw

        name = f"{self.path} [{theirs}]"
        what: list[Any] = [self.path, self.name, self.splits, self.text_field, self.fractions, self.held_out_documents]
        what.extend([self._reading] if self._reading else [])  # a place in the rows is counted in chunks
        return TextStream(lambda: _Read(self._loaded(theirs), name), text_of, self._tokenizer, seq_len, seed, f"{what}")

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split, as far as they are wanted. ValueError naming the row that cannot be read."""
        rows = iter(self._loaded(split))
        for number in count():
            if self.max_documents is not None and number >= self.max_documents:
                log.info("%s [%s]: max_documents=%d rows are read, the rest is not", self.path, split, number)
                return
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of the library, of Arrow, of a decoder, of the network
                raise ValueError(
                    f"cannot read row {number} of {self.path!r} [{split}] ({_reason(error)}): the data is damaged or "
                    "out of reach, load it again"
                ) from error
            yield row

    def _loaded(self, split: str) -> Iterable[dict[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise ValueError("data=hf needs the datasets library: pip install 'atlas-lm[hf]'") from error
        folder = Path(self.path)
        try:
            if (folder / "state.json").is_file():
                return (
                    datasets.load_from_disk(self.path) if split == "train" else _no_split(self.path, split, ["train"])
                )
            if (folder / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(self.path)
                return saved[split] if split in saved else _no_split(self.path, split, sorted(saved))
            return datasets.load_dataset(self.path, self.name, split=split, streaming=self.streaming, **self._reading)
        except _NoSplitError:
            raise
        except Exception as error:  # the library raises many kinds, for the network as for a misspelled name
            if self._reading and "chunksize" in str(error):
                raise ValueError(
                    f"chunksize={self._reading['chunksize']} is of JSON lines, text and CSV, and {self.path!r} is "
                    "of another kind: leave it out"
                ) from error
            raise ValueError(
                f"cannot load {self.path!r} [{split}] ({_reason(error)}): check path, name and split"
            ) from error


class _Read:
    """A streamed dataset; what it raises names the place."""

    def __init__(self, rows: Any, name: str) -> None:
        if not hasattr(rows, "state_dict"):
            raise ValueError(f"{name} cannot be streamed: leave streaming=true out for what save_to_disk wrote")
        self._rows, self._name = rows, name
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Continues where it was left."""
        if self._iterator is None:
            self._iterator = iter(self._rows)
        return self

    def __next__(self) -> Any:
        assert self._iterator is not None
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:  # of the library, of Arrow, of a decoder, of the network
            raise ValueError(
                f"cannot read {self._name} ({_reason(error)}): the data is damaged or out of reach, load it again"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state)


class _NoSplitError(ValueError):
    """A saved dataset has other splits."""


def _reason(error: Exception) -> str:
    """The first line of what is wrong, of the cause rather than of what the library wraps around it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return str(error).splitlines()[0] if str(error).strip() else type(error).__name__


def _no_split(path: str, split: str, known: list[str]) -> Any:
    raise _NoSplitError(f"{path!r} has no split {split!r}: it has {known}")
