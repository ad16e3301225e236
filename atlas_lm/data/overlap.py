"""Documents that occur in several splits: no text that is trained on may count as held out.

Names do not show it: one pattern matches what another one names, a dataset's split is read twice, a file is copied. So
documents are compared by content, up to line endings and the white space around them.

Where the user has named the splits, held-out text stays whole and training does without its copies. Where splits are
drawn by hash nobody has chosen them: there training stays what it is, so that a run can be resumed, and the held-out
copy is left out.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from atlas_lm.data.interfaces import SPLITS, Document, Split
from atlas_lm.data.ranks import rank_zero_only

log = logging.getLogger(__name__)

MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put before UTF-8


def content_key(raw: bytes) -> bytes | None:
    """16 bytes that equal documents share; None for white space alone."""
    text = raw.removeprefix(MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n").strip()
    return blake2b(text, digest_size=16).digest() if text else None


class Overlap:
    """Which documents a split has to do without, as they are in a split that goes before it. 16 bytes per document."""

    def __init__(self, drawn: bool, level: int | None = None) -> None:
        # nobody chose the splits that were drawn, and nobody can put anything right there
        self._level = level or (logging.INFO if drawn else logging.WARNING)
        order = SPLITS if drawn else SPLITS[::-1]
        self._before: dict[Split, tuple[Split, ...]] = {split: order[:i] for i, split in enumerate(order)}
        self._last = order[-1]  # goes before none: its keys need not be kept
        self._keys: dict[Split, set[bytes]] = {split: set() for split in SPLITS}
        self._kept: dict[Split, int] = defaultdict(int)
        self._left_out: dict[Split, list[tuple[str, int]]] = defaultdict(list)

    def note(self, split: Split, key: bytes | None) -> None:
        """A document of this content is in this split."""
        if key is not None and split != self._last:
            self._keys[split].add(key)

    def leaves_out(self, split: Split, key: bytes | None) -> bool:
        """Whether a document of `split` lies in a split that goes before it; all have to be noted before."""
        return key is not None and any(key in self._keys[other] for other in self._before[split])

    def count(self, split: Split, name: str, size: int, left_out: bool) -> None:
        """Remember what became of a document, for `report`."""
        if left_out:
            self._left_out[split].append((name, size))
        else:
            self._kept[split] += 1

    def remaining(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents without those that are left out; counts them from the start."""
        self._kept.clear()
        self._left_out.clear()
        for document in documents:
            key = content_key(document.raw)
            left_out = self.leaves_out(document.split, key)
            self.count(document.split, document.name, len(document.raw), left_out)
            if not left_out:
                yield document

    def report(self) -> None:
        """Log what was left out. ValueError when nothing is left of a split."""
        for split, found in self._left_out.items():
            others = " or ".join(self._before[split])
            if not self._kept[split]:
                raise ValueError(
                    f"all {len(found)} documents of the {split} split are in the {others} split too, such as "
                    f"{found[0][0]}: name different text for them"
                )
            self._warn(split, others, found)

    @rank_zero_only
    def _warn(self, split: Split, others: str, found: list[tuple[str, int]]) -> None:
        log.log(
            self._level, "data: %d of %d documents of the %s split, %d bytes, are in the %s split too, such as %s: "
            "they are left out of the %s split",
            len(found), len(found) + self._kept[split], split, sum(n for _, n in found), others, found[0][0], split,
        )  # fmt: skip
