"""Text files as a corpus: .txt, .md, .jsonl and .parquet, also compressed (.gz, .zst)."""

import glob
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from atlas_lm.data.interfaces import Document, Split, check_fractions, split_of
from atlas_lm.data.packed import PackedSource, cut
from atlas_lm.data.ranks import rank_zero_only
from atlas_lm.data.reading import READABLE, read_documents, suffix_of
from atlas_lm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)


class TextSource(PackedSource):
    """Files, named one by one or by glob patterns (`**` descends).

    A .txt or .md file is one document, a .jsonl line and a .parquet row are one each, taken from the field
    `text_field`. Documents of `files` go to a split by the hash of their content, so that equal documents never lie on
    both sides; with `validation_files` the rest of `files` is training text, and the test split is `test_files` or
    absent.
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
        self._keep_apart()
        self.splits_are_drawn = not self.held_out
        self.text_field = text_field
        self.fractions = (validation_fraction, test_fraction)
        self.document_bytes = document_bytes

    def _keep_apart(self) -> None:
        """No file in two splits: training does without those that are held out, validation without test's."""
        lists = [("files", self.files), *((f"{split}_files", paths) for split, paths in self.held_out.items())]
        for i, (key, paths) in enumerate(lists):
            others = {_identity(path) for _, later in lists[i + 1 :] for path in later}
            shared = [path for path in paths if _identity(path) in others]
            if len(shared) == len(paths):
                names = " or ".join(name for name, _ in lists[i + 1 :])
                raise ValueError(f"{key}: all {len(paths)} files are in {names} too: name different files")
            if shared:
                _say("%s: %d of %d files, such as %s, are held out, and left out here",
                     key, len(shared), len(paths), shared[0])  # fmt: skip
                paths[:] = [path for path in paths if _identity(path) not in others]

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
    """The files that paths and globs name, sorted, each once whatever names and links lead to it.

    ValueError: nothing matches, or a suffix is unknown.
    """
    found: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        if not isinstance(pattern, str):
            raise ValueError(f"{key}: {pattern!r} is no path: put quotes around it, {key}=['{pattern}']")
        # A name that exists is taken as it is, even if it holds a [ or a *.
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matched = [Path(match) for match in matches if Path(match).is_file()]
        if not matched and Path(pattern).is_dir():
            raise ValueError(f"{key}: {pattern!r} is a folder: name its files, e.g. {pattern.rstrip('/')}/**/*.txt")
        if not matched:
            raise ValueError(f"{key}: nothing matches {pattern!r} (seen from {Path.cwd()}): correct the path")
        found.update(matched)
    if not found:
        raise ValueError(f"{key} is empty: give paths or globs, e.g. data.source.{key}='[corpus/**/*.txt]'")
    for path in found:
        if suffix_of(path) not in READABLE:
            raise ValueError(f"{key}: cannot read {str(path)!r}: use {', '.join(READABLE)}, these also as .gz or .zst")
    once = {_identity(path): path for path in sorted(found, reverse=True)}  # the first of its names
    if len(once) < len(found):
        again = next(path for path in sorted(found) if once[_identity(path)] != path)
        _say("%s: %d of %d names, such as %s, lead to a file that another one names: it is read once",
             key, len(found) - len(once), len(found), again)  # fmt: skip
    return sorted(once.values())


def _identity(path: Path) -> tuple[int, int]:
    """What a file is, whatever it is called."""
    status = path.stat()
    return status.st_dev, status.st_ino


@rank_zero_only
def _say(message: str, *values: object) -> None:
    log.warning(f"warning: {message}", *values)
