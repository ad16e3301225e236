"""Python's own standard library as a corpus: the source text that every interpreter brings along."""

import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from atlas_lm.data.interfaces import Document, check_fractions, split_of
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.tokenizers import Tokenizer

# Third-party packages, and the tests: most distributions leave `test/` out, so with it the corpus would differ between
# two installations of one Python. `config-*` and `_sysconfigdata*` are written by the build of this very machine.
EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
BUILD_SPECIFIC = ("config-", "_sysconfigdata")


class StdlibSource(PackedSource):
    """The .py files of the running interpreter's standard library, without its tests: about 12 MB, a document a file.

    A file belongs to a split by the hash of its path relative to the library, so that the split is the same on every
    machine with the same Python version. ValueError: the interpreter ships no source text, or the fractions are wrong.
    """

    splits_are_drawn = True
    empty_documents = logging.INFO  # an empty __init__.py is usual

    def __init__(
        self,
        tokenizer: str | Tokenizer = "bytes",
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        root: str | None = None,
    ) -> None:
        super().__init__(tokenizer)
        check_fractions(validation_fraction, test_fraction)
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.root = Path(root or sysconfig.get_path("stdlib"))

    def documents(self) -> Iterator[Document]:
        """Every file, in the order of the relative paths."""
        names = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*.py"))
        names = [name for name in names if _belongs(name)]
        if not names:
            raise ValueError(
                f"no .py file below {str(self.root)!r}: this Python ships no source text, "
                "use data=text with files of your own"
            )
        for name in names:
            split = split_of(name.encode(), self.validation_fraction, self.test_fraction)
            yield Document(name, (self.root / name).read_bytes(), split)


def _belongs(name: str) -> bool:
    parts = name.split("/")
    return EXCLUDED_DIRECTORIES.isdisjoint(parts) and not parts[0].startswith(BUILD_SPECIFIC)
