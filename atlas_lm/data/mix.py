"""Several sources in one, each with its share of the sequences."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atlas_lm.data.interfaces import Sample, SequenceDataset, Source, Split
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.streams import MixStream, SequenceStream, SetStream, digest
from atlas_lm.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)


class MixSource:
    """Sequences of `sources` = {name: {"source": any source, "weight": above 0}}, with the weights as shares.

    A sequence is of one source. Training never ends: a small source comes again, in another order each time. Held-out
    text has the same shares, each sequence once. ValueError: no source, a weight of 0 or less, or different tokenizers.
    """

    streams = True

    def __init__(self, sources: Mapping[str, Mapping[str, Any]]) -> None:
        if not sources:
            raise ValueError("data=mix has no sources: data.source.sources.<name>={weight: 1, source: …} adds one")
        self._sources: dict[str, Source] = {}
        self._weights: dict[str, float] = {}
        self._is_set_up = False
        for name, entry in sources.items():
            if not isinstance(entry, Mapping) or set(entry) != {"source", "weight"}:
                raise ValueError(f"data.source.sources.{name} needs exactly a source and a weight")
            weight = entry["weight"]
            if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ValueError(f"data.source.sources.{name}.weight={weight} must be a number above 0")
            self._sources[name], self._weights[name] = entry["source"], float(weight)
        first = next(iter(self._sources))
        for name, source in self._sources.items():
            if source.tokenizer is None:
                raise ValueError(f"data.source.sources.{name} is no text and cannot be mixed")
            ours = self.tokenizer.fingerprint()
            if source.tokenizer.fingerprint() != ours:
                raise ValueError(
                    f"data.source.sources.{name} has another tokenizer ({source.tokenizer.fingerprint()}) than {first} "
                    f"({ours}): give all of them the same one"
                )

    @property
    def tokenizer(self) -> Tokenizer:
        """That of all sources."""
        tokenizer = next(iter(self._sources.values())).tokenizer
        assert tokenizer is not None
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def setup(self) -> None:
        """Read what has to be read of all sources. What one of them holds out none of the others trains on."""
        if self._is_set_up:
            return
        texts = {name: getattr(source, "text", source) for name, source in self._sources.items()}
        for source in self._sources.values():
            source.setup()
        packed = {name: text for name, text in texts.items() if isinstance(text, PackedSource)}
        for name in texts.keys() - packed.keys():
            log.warning(
                "data.source.sources.%s: its documents are not known, so they are compared with no others'", name
            )
        for name, text in packed.items():
            held_out = [other.held_out_keys() for others, other in packed.items() if others != name]
            count = text.exclude(frozenset().union(*held_out))
            if count:
                log.warning("data.source.sources.%s: %d documents that others hold out are not trained on", name, count)
        self._is_set_up = True

    def stream(self, seq_len: int, seed: int) -> SequenceStream:
        """The training sequences."""
        self.setup()
        parts: dict[str, tuple[SequenceStream, float]] = {}
        for name, source in self._sources.items():
            if getattr(source, "streams", False):
                part = source.stream(seq_len, seed)  # type: ignore[attr-defined]
            else:
                part = SetStream(source.dataset("train", seq_len), seed)
            parts[name] = part, self._weights[name]
        return MixStream(parts)

    def dataset(self, split: Split, seq_len: int | None) -> MixedDataset:
        """A held-out split. ValueError: a source has none, or it is too short."""
        if split == "train":
            raise ValueError("data=mix is trained on as a stream: use stream()")
        return MixedDataset(
            {name: (source.dataset(split, seq_len), self._weights[name]) for name, source in self._sources.items()}
        )

    def bytes_per_token(self, split: Split) -> None:
        """None: it differs between the sources."""
        return None


class MixedDataset(SequenceDataset):
    """Sequences of several datasets, spread evenly, as many of each as its weight says and none twice."""

    def __init__(self, parts: Mapping[str, tuple[SequenceDataset, float]]) -> None:
        self._parts = [dataset for dataset, _ in parts.values()]
        self._names = list(parts)
        self.seq_len = self._parts[0].seq_len
        if any(dataset.seq_len != self.seq_len for dataset in self._parts):
            raise ValueError("the sources have sequences of different lengths: set data.seq_len")
        total = min(len(dataset) / weight for dataset, weight in parts.values())
        counts = [max(1, int(total * weight + 1e-9)) for _, weight in parts.values()]
        self._counts = counts
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        order = np.argsort(places, kind="stable")
        self._part = np.repeat(np.arange(len(counts)), counts)[order]
        items = [np.arange(count) * len(part) // count for count, part in zip(counts, self._parts, strict=True)]
        self._item = np.concatenate(items)[order]

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self._parts[self._part[index]][int(self._item[index])]

    def fingerprint(self) -> str:
        """Hash of all parts and their shares."""
        return digest(self._names, self._counts, [dataset.fingerprint() for dataset in self._parts])

    def scored_tokens(self, indices: Sequence[int]) -> int:
        """Targets that count."""
        return sum(self._parts[self._part[i]].scored_tokens([int(self._item[i])]) for i in indices)

    def scored_bytes(self, indices: Sequence[int]) -> bytes | None:
        """The text of the targets, in order; None where a part has none."""
        found = [self._parts[self._part[i]].scored_bytes([int(self._item[i])]) for i in indices]
        return None if any(text is None for text in found) else b"".join(text for text in found if text is not None)
