"""Packed documents apart from each other: each is computed as a sequence of its own (`reset_at_document`).

Attention, convolutions, projection and memories then restart at every document, at its own chunks and shards: a
packed document is the document alone.
"""

# B batch, T tokens, N documents, L tokens of the longest of them

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Documents of like length as rows of one batch."""

    source_NL: Tensor  # where each token lies among the B·T; after a document's end some other one
    kept_M: Tensor  # places among the N·L that hold a document's token

    def take(self, x_BT: Tensor) -> Tensor:
        """(B, T) → (N, L)."""
        return x_BT.flatten()[self.source_NL]


def apart(starts_BT: Tensor, every_length: bool = False) -> list[Rows]:
    """Every document of a batch, those of like length (up to a factor of two) together.

    A row begins a document whether it is marked or not. On a GPU the starts are read by the host. `every_length`: also
    for lengths that no document has, a row of one token that is nobody's, so that the number of rows depends on T
    alone: ranks that share their parameters must ask for them equally often.
    """
    starts = starts_BT.cpu().clone()
    starts[:, 0] = True
    first_N = starts.flatten().nonzero().squeeze(1)
    length_N = torch.diff(first_N, append=first_N.new_tensor([starts.numel()]))
    found = []
    bucket_N = length_N.float().log2().floor()
    buckets = range(starts.size(1).bit_length()) if every_length else bucket_N.unique().tolist()
    for bucket in buckets:
        here = bucket_N == bucket
        if not here.any():
            found.append(Rows(torch.zeros(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)))
            continue
        first, length = first_N[here].unsqueeze(1), length_N[here].unsqueeze(1)
        place_L = torch.arange(int(length.max()))
        within = place_L < length
        source = torch.where(within, first + place_L, first)
        found.append(Rows(source, within.flatten().nonzero().squeeze(1)))
    return [Rows(*(x.to(starts_BT.device) for x in rows)) for rows in found]


def together(rows: Sequence[Rows], parts_NL: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """What was computed for each (N, L, …), back at the documents' places: (B, T, …)."""
    order = torch.cat([row.source_NL.flatten()[row.kept_M] for row in rows])
    values = torch.cat([part.flatten(0, 1)[row.kept_M] for row, part in zip(rows, parts_NL, strict=True)])
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return values[inverse].reshape(*shape, *values.shape[1:])


def cuts(starts_BT: Tensor) -> list[tuple[int, int, bool]]:
    """(B, T) document starts → the pieces between them: (first token, token after the last, a document starts here).

    ValueError: documents start in some rows and not in others, which then have no state in common.
    """
    starts = starts_BT.cpu()
    here = starts.any(0)
    if not bool((starts.all(0) == here).all()):
        column = int((starts.all(0) != here).nonzero()[0])
        raise ValueError(
            f"in a stream with reset_at_document a document must start in all rows at once, token {column} does so in "
            "some: stream the rows one by one"
        )
    edges = sorted({0, *here.nonzero().squeeze(1).tolist(), starts.size(1)})
    return [(a, b, bool(here[a])) for a, b in pairwise(edges)]
