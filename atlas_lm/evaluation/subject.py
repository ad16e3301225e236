"""A trained run as the evaluation sees it: its model, and its held-out text in sequences of any length."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.probes import attention_reach
from atlas_lm.runs.load import load_data, load_model
from atlas_lm.runs.resolve import resolve_checkpoint, resolve_run


class Text(NamedTuple):
    """Held-out sequences: N of T tokens."""

    tokens_NT: Tensor
    targets_NT: Tensor
    document_start_NT: Tensor | None = None  # None: one document

    def cut(self, rows: slice, tokens: slice = slice(None)) -> Text:
        """Some rows, some of their tokens."""
        starts = self.document_start_NT
        return Text(
            self.tokens_NT[rows, tokens],
            self.targets_NT[rows, tokens],
            None if starts is None else starts[rows, tokens],
        )

    def last(self, count: int) -> Text:
        """The same sequences as one sees them who has not read what is before the last `count` tokens."""
        return self.cut(slice(None), slice(self.tokens_NT.size(1) - count, None))


class Subject:
    """One run. ValueError: there is none of that name, or it is damaged."""

    def __init__(self, name: str, outputs: str = "outputs") -> None:
        self.folder: Path = resolve_run(name, outputs)
        self.name = name if Path(name).name == name else f"{self.folder.parent.name}/{self.folder.name}"
        self.checkpoint = resolve_checkpoint(name, outputs)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def model(self) -> AtlasLM:
        """In eval mode, at the chunk sizes that training had reached, in float32."""
        return load_model(self.checkpoint).to(self.device)

    @cached_property
    def content(self) -> dict[str, Any]:
        return read_checkpoint(self.checkpoint, lazily=True)

    @property
    def window(self) -> int:
        """Tokens of one attention window."""
        return self.model.config.window

    @property
    def reach(self) -> int:
        """Tokens that all layers' windows together reach back."""
        return attention_reach(self.model.config)

    @property
    def has_memory(self) -> bool:
        return self.model.config.memory != "none"

    @cached_property
    def trained_length(self) -> int:
        """Tokens of a training sequence."""
        return load_data(self.folder, self.content).seq_len

    @cached_property
    def tokenizer(self) -> Any:
        """None where the tokens are no text."""
        return load_data(self.folder, self.content).tokenizer

    def text(self, length: int, sequences: int) -> Text:
        """Held-out sequences of `length` tokens, evenly spread over the split, on the model's device.

        ValueError: the split is shorter than one of them.
        """
        data = load_data(self.folder, self.content, seq_len=length, val_sequences=sequences, val_batch_size=1)
        found = list(data.val_dataloader())
        names = ("input_ids", "targets", "document_start")
        return Text(*(torch.cat([batch[name] for batch in found]).to(self.device) for name in names))
