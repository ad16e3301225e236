"""Multi-query associative recall (MQAR, Zoology, arXiv 2312.04927) beyond the attention window.

    k1 v1 k2 v2 … kP vP   filler × gap   k7 v7 k2 v2 …
    ───── pairs ───────   ────────────   ── queries, in random order ──

Only the answers are scored: the target at a query's key is its value, every other target is -100. A query comes more
than `gap` tokens after its pair, so attention over fewer tokens than that cannot answer it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np
import torch

from atlas_lm.data.interfaces import SPLITS, UNSCORED, Sample, SequenceDataset, Split


@dataclass(frozen=True)
class RecallLayout:
    """Sizes of one sequence.

    With K = num_symbols / 2 the token ids are: keys [0, K), values [K, 2K), filler [2K, 2K + num_filler).
    """

    num_pairs: int
    num_symbols: int
    num_filler: int
    gap: int

    @property
    def num_keys(self) -> int:
        return self.num_symbols // 2

    @property
    def seq_len(self) -> int:
        return 4 * self.num_pairs + self.gap


class RecallSource:
    """Sequences drawn from (seed, split, index), the same ones at every call: nothing is stored and nothing downloaded.

    Keys of one sequence differ; values are drawn independently, so that guessing scores exactly `chance`. `gap` is the
    number of filler tokens, by default as many as fill `data.seq_len`, or 2 · window where that is null. A stack of n
    attention layers hands information on over n windows: against such a model keep gap ≥ n · window.

    ValueError: any size out of range, a gap below 2 · window, a `seq_len` that the sequence does not fit.
    """

    def __init__(
        self,
        num_pairs: int = 16,
        num_symbols: int = 128,
        num_filler: int = 32,
        window: int = 16,
        gap: int | None = None,
        samples: int = 100_000,
        validation_samples: int = 1024,
        test_samples: int = 1024,
        seed: int = 0,
    ) -> None:
        sizes = {"num_pairs": num_pairs, "num_filler": num_filler, "window": window, "samples": samples,
                 "validation_samples": validation_samples, "test_samples": test_samples}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if num_symbols < 2 or num_symbols % 2:
            raise ValueError(f"num_symbols={num_symbols} must be even and positive: half are keys, half are values")
        if num_pairs > num_symbols // 2:
            raise ValueError(f"num_pairs={num_pairs} needs as many different keys: num_symbols ≥ {2 * num_pairs}")
        if gap is not None and gap < 2 * window:
            raise ValueError(f"gap={gap} is below two windows: raise it to {2 * window} or lower window={window}")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        self.num_pairs, self.num_symbols, self.num_filler = num_pairs, num_symbols, num_filler
        self.window, self.gap, self.seed = window, gap, seed
        self.samples: dict[Split, int] = dict(zip(SPLITS, (samples, validation_samples, test_samples), strict=True))

    @property
    def vocab_size(self) -> int:
        """num_symbols + num_filler."""
        return self.num_symbols + self.num_filler

    @property
    def tokenizer(self) -> None:
        """None: the tokens are no text."""
        return None

    @property
    def chance(self) -> float:
        """Accuracy of guessing a value."""
        return 2 / self.num_symbols

    def setup(self) -> None:
        """Nothing to read."""

    def dataset(self, split: Split, seq_len: int | None) -> "RecallDataset":
        """Sequences of one split; `seq_len` null: as long as pairs, gap and queries take."""
        gap = self.gap
        if gap is None:
            gap = 2 * self.window if seq_len is None else seq_len - 4 * self.num_pairs
        layout = RecallLayout(self.num_pairs, self.num_symbols, self.num_filler, gap)
        if seq_len is not None and (layout.seq_len != seq_len or gap < 2 * self.window):
            needed = 4 * self.num_pairs + (self.gap or 2 * self.window)
            raise ValueError(
                f"seq_len={seq_len} does not fit: num_pairs={self.num_pairs} and the gap take "
                f"{'at least ' if self.gap is None else ''}{needed} tokens; set data.seq_len={needed} or null"
            )
        return RecallDataset(layout, self.samples[split], (self.seed, SPLITS.index(split)))

    def bytes_per_token(self, split: Split) -> None:
        """None: the tokens are no text."""
        return None


class RecallDataset(SequenceDataset):
    """Item i: `input_ids`, `targets` (T,) int64, `document_start` (T,) bool, True at 0 only."""

    def __init__(self, layout: RecallLayout, samples: int, seed: tuple[int, int]) -> None:
        self.layout = layout
        self.seq_len = layout.seq_len
        self._samples = samples
        self._seed = seed

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._samples:
            raise IndexError(f"sequence {index} of {self._samples}")
        p = self.layout
        rng = np.random.default_rng([*self._seed, index])
        keys = rng.permutation(p.num_keys)[: p.num_pairs]
        values = rng.integers(p.num_keys, p.num_symbols, p.num_pairs)
        filler = rng.integers(p.num_symbols, p.num_symbols + p.num_filler, p.gap)
        order = rng.permutation(p.num_pairs)
        pairs = np.stack([keys, values], axis=1)
        tokens = torch.from_numpy(np.concatenate([pairs.ravel(), filler, pairs[order].ravel()]).astype(np.int64))
        targets = torch.full((self.seq_len,), UNSCORED, dtype=torch.int64)
        asked = 2 * p.num_pairs + p.gap
        targets[asked::2] = tokens[asked + 1 :: 2]
        document_start = torch.zeros(self.seq_len, dtype=torch.bool)
        document_start[0] = True
        return {"input_ids": tokens, "targets": targets, "document_start": document_start}

    def fingerprint(self) -> str:
        """Hash of the sizes and the seed."""
        text = json.dumps([asdict(self.layout), self._samples, self._seed])
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def scored_tokens(self, indices: Sequence[int]) -> int:
        """One answer per pair."""
        return len(indices) * self.layout.num_pairs

    def scored_bytes(self, indices: Sequence[int]) -> None:
        """None: the tokens are no text."""
        return None
