"""A Hugging Face dataset as a corpus, by name or from disk."""

import logging
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from atlas_lm.data.interfaces import SPLITS, Document, Split, check_fractions, split_of
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.reading import text_bytes
from atlas_lm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)


class HuggingFaceSource(PackedSource):
    """The rows of a dataset, one document each, taken from the column `text_field`.

    `path` is a name on the hub, a folder of data files, or a folder written by `save_to_disk`. Where the dataset names
    no validation split, the rows of `train_split` go to the splits by the hash of their content. `streaming` downloads
    only the first `max_documents` rows of each split; they are tokenized into memory like any other corpus, because a
    stream read on the fly cannot be resumed exactly.

    ValueError: `datasets` is not installed, nothing at `path`, unknown split or column, a row without text,
    `streaming` without `max_documents`.
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
    ) -> None:
        super().__init__(tokenizer)
        check_fractions(validation_fraction, test_fraction)
        if streaming and max_documents is None:
            raise ValueError(
                "streaming=true needs max_documents: the rows are held in memory, e.g. max_documents=10000"
            )
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

    def documents(self) -> Iterator[Document]:
        """The rows in the dataset's order, split by split."""
        by_hash = self.splits["validation"] is None
        for split, theirs in self.splits.items():
            if theirs is None:
                continue
            for number, row in enumerate(self._rows(theirs)):
                where = f"{self.path} [{theirs}] row {number}"
                if self.text_field not in row:
                    raise ValueError(f"{where}: no column {self.text_field!r} in {sorted(row)}: set text_field")
                raw = text_bytes(where, row[self.text_field], self.text_field)
                yield Document(where, raw, split_of(raw, *self.fractions) if by_hash else split)

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
            return datasets.load_dataset(self.path, self.name, split=split, streaming=self.streaming)
        except _NoSplitError:
            raise
        except Exception as error:  # the library raises many kinds, for the network as for a misspelled name
            raise ValueError(
                f"cannot load {self.path!r} [{split}] ({_reason(error)}): check path, name and split"
            ) from error


class _NoSplitError(ValueError):
    """A saved dataset has other splits."""


def _reason(error: Exception) -> str:
    """The first line of what is wrong, of the cause rather than of what the library wraps around it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return str(error).splitlines()[0] if str(error).strip() else type(error).__name__


def _no_split(path: str, split: str, known: list[str]) -> Any:
    raise _NoSplitError(f"{path!r} has no split {split!r}: it has {known}")
