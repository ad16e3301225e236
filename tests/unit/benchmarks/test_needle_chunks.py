"""Shares of answered questions by how far their statements lie back."""

import torch

from benchmarks.needle_chunks import by_distance


def test_each_example_counts_in_the_bin_of_its_distance() -> None:
    hits = torch.tensor([True, False, True, True, False])
    found = by_distance(hits, torch.tensor([1.0, 1.9, 2.0, 7.9, 20.0]))
    assert {row: of.mean for row, of in found.items()} == {"1–2": 0.5, "2–4": 1.0, "4–8": 1.0}
