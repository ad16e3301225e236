"""context: who gains from far text, and where in a sequence a model is ahead of its twin."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import context
from benchmarks.context import Losses

LENGTH, WINDOW, NEAR = 64, 8, 16


def made(gain: float, ahead: float) -> Losses:
    """Three seeds: losses near 3 that fall by `ahead` from NEAR on; a last window that far text helps by `gain`."""
    generator = torch.Generator().manual_seed(0)
    text = torch.rand(1, 40, LENGTH, generator=generator)  # what all models find hard
    whole = 2.5 + text + 0.01 * torch.randn(3, 40, LENGTH, generator=generator)
    whole[:, :, NEAR:] -= ahead
    return Losses(whole, gain + 0.05 * torch.randn(3, 40, WINDOW, generator=generator))


def test_the_share_of_full_attentions_gain() -> None:
    found = {"memory": made(0.15, 0), "useless": made(0.0, 0), "no memory": made(0, 0), "full attention": made(0.2, 0)}
    table = context.gains(found, NEAR)
    assert table.cells["memory"]["all seeds"].low > 0.14
    assert table.cells["useless"]["all seeds"].low < 0 < table.cells["useless"]["all seeds"].high
    assert list(table.cells["memory"]) == ["all seeds", "seed 0", "seed 1", "seed 2"]
    assert "- memory: 75% of what full attention gains" in table.notes
    (useless,) = [note for note in table.notes if note.startswith("- useless")]
    assert abs(float(useless.split(": ")[1].split("%")[0])) <= 2


def test_a_text_from_which_full_attention_gains_nothing_tests_no_memory() -> None:
    found = {"memory": made(0.15, 0), "no memory": made(0, 0), "full attention": made(0.0, 0)}
    assert context.gains(found, NEAR).notes == ["- Full attention gains nothing on this text: it tests no memory."]


def test_without_full_attention_nothing_is_said_of_the_text() -> None:
    notes = context.gains({"memory": made(0.15, 0), "no memory": made(0, 0)}, NEAR).notes
    assert notes == ["- Full attention was not trained: what this text offers is not known."]


def test_a_model_is_ahead_where_its_loss_is_below_the_twins_on_the_same_text() -> None:
    found = {"memory": made(0, 0.05), "worse": made(0, -0.05), "no memory": made(0, 0)}
    bins = context.edges(NEAR, LENGTH)
    assert bins == [0, 16, 32, 64]
    table = context.against_twin({name: of.whole_SNT for name, of in found.items()}, bins, "steps")
    assert table.title.endswith("at equal steps")
    assert list(table.cells) == ["memory", "worse"]
    near, *far = table.cells["memory"].values()
    assert near.low <= 0 <= near.high
    assert all(value.high < 0 for value in far), "0.05 shows although texts differ by 0.3"
    assert all(value.low > 0 for value in list(table.cells["worse"].values())[1:])


def test_bins_begin_at_attentions_reach_and_end_with_the_sequence() -> None:
    assert context.edges(392, 2048) == [0, 392, 784, 1568, 2048]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no .*worth.json: it comes from python -m benchmarks.worth"):
        context.main(["--worth", str(tmp_path)])
    (tmp_path / "worth.json").write_text(json.dumps({"memory": {}}))
    with pytest.raises(SystemExit, match="has no model 'no memory'"):
        context.main(["--worth", str(tmp_path)])
