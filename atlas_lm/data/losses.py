"""What a tokenizer does not give back of a text, character by character.

A vocabulary without a character drops it or writes one <unk> for a whole word, a normalizer writes small letters for
capitals, a pre-tokenizer skips white space. No token stands for these characters, so a model spends no bit on them:
counted as text they would make its bits per byte as low as one likes. They count in no figure, and are reported.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlas_lm.data.ranks import rank_zero_only

log = logging.getLogger(__name__)

KEPT, CHANGED, UNKNOWN = 0, 1, 2  # of a character: decoding gives it back; another or none; nothing knows it
MOST_UNKNOWN = 0.1  # share of unknown characters above which a split is refused: it is another language or script
EXAMPLES = 8  # unknown characters to show


@dataclass(frozen=True, slots=True)
class Losses:
    """Characters of one split: all of them, those that come back changed or not at all, those that are unknown."""

    characters: int = 0
    changed: int = 0
    unknown: int = 0
    examples: str = ""

    def __add__(self, other: "Losses") -> "Losses":
        examples = "".join(dict.fromkeys(self.examples + other.examples))[:EXAMPLES]
        return Losses(
            self.characters + other.characters, self.changed + other.changed, self.unknown + other.unknown, examples
        )

    @property
    def share(self) -> float:
        """Lost characters per character."""
        return (self.changed + self.unknown) / self.characters if self.characters else 0.0

    @property
    def unknown_share(self) -> float:
        """Unknown characters per character."""
        return self.unknown / self.characters if self.characters else 0.0


def unknown_id(model_json: str) -> tuple[int | None, str]:
    """The id that a tokenizer.json writes for what it does not know, and that token's text; (None, "") without one."""
    model: dict[str, Any] = json.loads(model_json)["model"]
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        found = model.get("unk_id")
        return (None, "") if found is None else (int(found), str(vocabulary[found][0]))
    token = model.get("unk_token")
    return (None, "") if token is None or token not in vocabulary else (int(vocabulary[token]), str(token))


def fate_of(
    text: str,
    back: str,
    said: Sequence[tuple[int, int]],
    distinguishes: Callable[[int], bool],
) -> np.ndarray:
    """(len(text),) uint8: KEPT, CHANGED or UNKNOWN for each character of a text that decoding does not give back.

    `back`: the characters that come back: the decoded and the normalized text. `said`: (start, end) of the characters
    that each known token covers. `distinguishes`: whether the tokenizer writes more for the white space at an index
    when it is doubled; offsets often leave white space out that a token does stand for.
    """
    points, edges = code_points(text), np.zeros(len(text) + 1, dtype=np.int64)
    if said:
        spans = np.asarray(said, dtype=np.int64)
        np.add.at(edges, spans[:, 0], 1)
        np.add.at(edges, spans[:, 1], -1)
    covered = np.cumsum(edges)[:-1] > 0
    fate = np.where(covered, KEPT, UNKNOWN).astype(np.uint8)
    fate[covered & ~np.isin(points, np.unique(code_points(back)))] = CHANGED
    for point in np.unique(points[~covered]).tolist():
        if chr(point).isspace():
            where = np.flatnonzero((points == point) & ~covered)
            fate[where] = KEPT if distinguishes(int(where[0])) else CHANGED
    return fate


def code_points(text: str) -> np.ndarray:
    """(len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def count_losses(raw: bytes, lost: np.ndarray | None) -> Losses:
    """The losses of one document. `lost`: (len(raw),) the fate of the character that each byte belongs to."""
    if lost is None and raw.isascii():
        return Losses(len(raw))
    starts = (np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80  # of the characters in UTF-8
    if lost is None:
        return Losses(int(starts.sum()))
    unknown = starts & (lost == UNKNOWN)
    examples = ""
    if unknown.any():
        text = raw.decode(errors="replace")
        at = np.flatnonzero((lost == UNKNOWN)[starts])
        examples = "".join(dict.fromkeys(text[i] for i in at[:1000].tolist()))[:EXAMPLES]
    return Losses(int(starts.sum()), int((starts & (lost == CHANGED)).sum()), int(unknown.sum()), examples)


def total_losses(losses: Iterable[Losses], start: Losses) -> Losses:
    """Their sum; adding up documents without a loss takes no time."""
    whole, total = 0, start
    for found in losses:
        if found.changed or found.unknown:
            total += found
        else:
            whole += found.characters
    return total + Losses(whole)


def check_losses(losses: dict[str, Losses]) -> None:
    """Log what the tokenizer loses of each split. ValueError above a tenth of unknown characters in one of them."""
    for split, found in losses.items():
        if found.unknown_share > MOST_UNKNOWN:
            raise ValueError(
                f"{found.unknown_share:.1%} of the characters of the {split} split are unknown to the tokenizer"
                f"{_such_as(found)}: it was made for another text; use tokenizer=bytes, a byte-level one "
                "(prepare with tokenizer=bpe writes one), or one trained on this text"
            )
    _report({split: found for split, found in losses.items() if found.share})


@rank_zero_only
def _report(losses: dict[str, Losses]) -> None:
    for split, found in losses.items():
        log.warning(
            "warning: the tokenizer loses %.2g %% of the characters of the %s split (%d unknown%s, %d changed or "
            "skipped by its normalizer or pre-tokenizer, of %d): they count in no figure",
            100 * found.share, split, found.unknown, _such_as(found), found.changed, found.characters,
        )  # fmt: skip


def _such_as(found: Losses) -> str:
    return f", such as {found.examples!r}" if found.examples else ""
