"""Needles in text: key–value statements scattered in real text of any other source, and questions about them later.

    … text …  [bako=528]  … text …  (gap)  … text …  [bako=528]  … text …
              statement                              question

Every token is trained on; in validation and test the answers alone are scored, so that loss and accuracy are those of
retrieval. There a question comes more than `gap` tokens after its statement: attention over fewer cannot answer. In
training one question in ten comes within them: what is never asked for soon is not found soon, by memory or attention.
Keys of training, validation and test are different ones.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import product

import numpy as np
import torch

from atlas_lm.data.interfaces import SPLITS, UNSCORED, Sample, SequenceDataset, Source, Split, split_of
from atlas_lm.data.tokenizers import Tokenizer

NEAR = 0.1  # share of the questions in training that come within `gap` tokens
HEXADECIMAL = "0123456789abcdef"
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"


def keys_of(split: Split) -> list[str]:
    """Words of four letters; a key belongs to one split, whatever the seed."""
    words = ("".join(letters) for letters in product(CONSONANTS, VOWELS, CONSONANTS, VOWELS))
    return [word for word in words if split_of(word.encode(), 0.1, 0.1) == split]


@dataclass(frozen=True)
class Statement:
    """Token ids: what leads to the answer, the answer, what follows."""

    lead: np.ndarray
    answer: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.lead) + len(self.answer) + len(self.end)

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids, and which of them are the answer's."""
        ids = np.concatenate([self.lead, self.answer, self.end])
        asked = np.zeros(len(ids), dtype=bool)
        asked[len(self.lead) : len(self.lead) + len(self.answer)] = True
        return ids, asked


def statement(tokenizer: Tokenizer, key: str, value: str) -> Statement:
    """`[key=value]`. The parts are encoded one by one, so that a question leads to its answer by the same tokens."""
    return Statement(*(np.asarray(tokenizer.encode(part)) for part in (f"\n[{key}=", value, "]\n")))


@dataclass(frozen=True)
class NeedleLayout:
    """What is put into a sequence of `seq_len` tokens."""

    needles: int  # statements, and questions
    digits: int  # of a value
    gap: int  # tokens between the last statement and the first question, at least
    seq_len: int
    long_share: float = 0.0  # of the sequences: one statement, of `long_digits` hexadecimal digits
    long_digits: int = 32

    def of(self, rng: np.random.Generator) -> tuple[int, int, str]:
        """Statements, digits and what these are drawn from, in the next sequence."""
        if self.long_share and rng.random() < self.long_share:
            return 1, self.long_digits, HEXADECIMAL
        return self.needles, self.digits, HEXADECIMAL[:10]


class NeedlesSource:
    """Sequences of `text` with `needles` statements in their first part and as many questions in their last one.

    `text`: any other source. `gap`: tokens between the statements and the questions that are scored, at least; null:
    more than all attention windows together reach, `layers` · (`window` + `attention_conv` − 1). `answer_weight`: of an
    answer's token in the training loss, where others have 1: answers are one token in fifty, and from their mean alone
    a model learns the text and no answers. `long_share`: of the sequences, which have a single statement of
    `long_digits` hexadecimal digits, as S-NIAH-3 asks for them. Keys, values and places of a sequence are drawn from
    (seed, split, index). ValueError: a size out of range, a `seq_len` in which gap and statements do not fit.
    """

    def __init__(
        self,
        text: Source,
        needles: int = 8,
        digits: int = 3,
        window: int = 64,
        layers: int = 2,
        attention_conv: int = 1,
        gap: int | None = None,
        answer_weight: float = 20.0,
        seed: int = 0,
        long_share: float = 0.0,
        long_digits: int = 32,
    ) -> None:
        if not 0 <= long_share <= 1:
            raise ValueError(f"long_share={long_share} is a share of the sequences: it must lie between 0 and 1")
        if not 1 <= answer_weight < float("inf"):
            raise ValueError(f"answer_weight={answer_weight} must be at least 1, the weight of the other tokens")
        sizes = {"needles": needles, "digits": digits, "window": window, "layers": layers, "long_digits": long_digits}
        for name, size in (sizes | {"attention_conv": attention_conv}).items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        least = layers * (window + attention_conv - 1)
        if gap is not None and gap < least:
            raise ValueError(
                f"gap={gap} lies within {layers} windows of {window} with a convolution of {attention_conv}: raise it "
                f"to {least}"
            )
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        fewest = min(len(keys_of(split)) for split in SPLITS)
        if needles > fewest:
            raise ValueError(f"needles={needles} are more than the {fewest} keys that there are")
        if getattr(text, "streams", False):
            raise ValueError(
                "needles are put into a text of known length: not into one that is read on the fly, or mixed"
            )
        if text.tokenizer is None:
            raise ValueError("needles are put into text, and this source has none: give one such as data=stdlib's")
        self.text, self.seed, self.answer_weight = text, seed, answer_weight
        self.needles, self.digits = needles, digits
        self.long_share, self.long_digits = long_share, long_digits
        self.gap = least if gap is None else gap

    @property
    def vocab_size(self) -> int:
        """The text's."""
        return self.text.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The text's."""
        assert self.text.tokenizer is not None
        return self.text.tokenizer

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing a digit, where each is a token of its own; None elsewhere."""
        return 0.1 if len(self.tokenizer.encode("52810")) == 5 else None

    def setup(self) -> None:
        """Read the text."""
        self.text.setup()

    def dataset(self, split: Split, seq_len: int | None) -> "NeedlesDataset":
        """Sequences of one split, as many as the text has."""
        base = self.text.dataset(split, seq_len)
        layout = NeedleLayout(self.needles, self.digits, self.gap, base.seq_len, self.long_share, self.long_digits)
        return NeedlesDataset(base, self.tokenizer, layout, split, self.seed, self.answer_weight)

    def bytes_per_token(self, split: Split) -> None:
        """None: answers are scored, not the text."""
        return None


class NeedlesDataset(SequenceDataset):
    """Item i: `input_ids` and `targets` (T,) int64, `document_start` (T,) bool, True at 0 and where a document of the
    text begins; in training `weights` (T,) of the targets in the loss."""

    def __init__(
        self,
        base: SequenceDataset,
        tokenizer: Tokenizer,
        layout: NeedleLayout,
        split: Split,
        seed: int,
        answer_weight: float,
    ) -> None:
        self.base, self.layout, self.seq_len = base, layout, layout.seq_len
        self._tokenizer, self._split, self._seed, self._weight = tokenizer, split, seed, answer_weight
        self._keys = keys_of(split)
        kinds = [(layout.needles, layout.digits)] + [(1, layout.long_digits)] * (layout.long_share > 0)
        for needles, digits in kinds:
            longest = max(len(statement(tokenizer, key, "8" * digits)) for key in self._keys)
            needed = 2 * needles * longest + layout.gap + 2
            if layout.seq_len < needed:
                raise ValueError(
                    f"seq_len={layout.seq_len} is too short: {needles} statements, as many questions and a gap of "
                    f"{layout.gap} take up to {needed} tokens: raise data.seq_len or lower "
                    + ("needles" if digits == layout.digits else "long_digits")
                )

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        p, item = self.layout, self.base[index]
        rng = np.random.default_rng([self._seed, SPLITS.index(self._split), index])
        count, digits, symbols = p.of(rng)
        keys = rng.choice(len(self._keys), count, replace=False)
        values = ["".join(symbols[i] for i in rng.integers(0, len(symbols), digits)) for _ in keys]
        needles = [statement(self._tokenizer, self._keys[k], v) for k, v in zip(keys, values, strict=True)]
        text = np.append(item["input_ids"].numpy(), item["targets"].numpy()[-1:])
        text = text[: p.seq_len + 1 - 2 * sum(map(len, needles))]  # what the statements leave room for
        early = np.sort(rng.integers(0, (len(text) - p.gap) // 2 + 1, count))
        late = rng.integers(early[-1] + p.gap, len(text) + 1, count)
        if self._split == "train":
            near = rng.random(count) < NEAR
            late = np.where(near, early + rng.integers(0, p.gap + 1, count), late)
        places = [(place, question, i) for question, row in enumerate((early, late)) for i, place in enumerate(row)]
        ids, asked, last = [], [], 0
        for place, question, i in sorted(places):
            tokens, answer = needles[i].joined()
            ids += [text[last:place], tokens]
            asked += [np.zeros(place - last, dtype=bool), answer & (question == 1)]
            last = place
        row = torch.from_numpy(np.concatenate([*ids, text[last:]]).astype(np.int64))
        scored = torch.from_numpy(np.concatenate([*asked, np.zeros(len(text) - last, dtype=bool)]))
        start = torch.zeros(p.seq_len, dtype=torch.bool)
        start[1:] = row[:-2] == self._tokenizer.separator_id
        start[0] = True
        targets = row[1:]
        item = {"input_ids": row[:-1], "targets": targets, "document_start": start}
        if self._split == "train":
            return {**item, "weights": torch.where(scored[1:], self._weight, 1.0)}
        return {**item, "targets": targets.masked_fill(~scored[1:], UNSCORED)}

    def fingerprint(self) -> str:
        """Hash of the text, the sizes and the seed."""
        sizes = asdict(self.layout)
        if not self.layout.long_share:  # as before there were long values: runs of then go on
            del sizes["long_share"], sizes["long_digits"]
        text = json.dumps([self.base.fingerprint(), sizes, self._split, self._seed, self._weight])
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def scored_tokens(self, indices: Sequence[int]) -> int:
        """All of them in training, answers elsewhere."""
        if self._split == "train":
            return len(indices) * self.seq_len
        return sum(int((self[i]["targets"] != UNSCORED).sum()) for i in indices)

    def scored_bytes(self, indices: Sequence[int]) -> None:
        """None: answers are scored, not the text."""
        return None
