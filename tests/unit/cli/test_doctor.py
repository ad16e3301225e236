"""What training will take: printed without training, for the settings of train.py."""

import pytest

from atlas_lm.cli import doctor
from atlas_lm.training.budget import Budget

SMALL = [
    "model=tiny_deep", "model.layers=1", "model.dim=32", "model.head_dim=16", "model.rank=15", "data.seq_len=128",
    "data.batch_size=2",
]  # fmt: skip


@pytest.mark.long
def test_it_prints_what_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(SMALL)
    shown = capsys.readouterr().out
    for line in ("weights", "optimizer", "activations", "kept fast weights", "at most at one moment", "5 snapshots"):
        assert line in shown
    assert "80 GB: " in shown
    assert "sequences of 128 tokens at most" in shown


@pytest.mark.long
def test_a_batch_that_fits_no_card_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CARDS", (1e6, 2e6))
    with pytest.raises(
        ValueError, match=r"2 sequences of 128 tokens needs .* lower data.batch_size, or set model.check"
    ):
        doctor.main(SMALL)


def test_a_setting_that_training_would_refuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.window=0 must be at least 1"):
        doctor.main([*SMALL, "model.window=0"])


def test_ranks_share_what_is_sharded() -> None:
    found = Budget(8_000_000_000, 8_000_000_000, 16_000_000_000, 10_000_000_000, 0, 50_000_000_000)
    whole, eighth = (doctor.table(found, ranks, 5).columns[1]._cells for ranks in (1, 8))
    assert whole[:3] == ["8.00 GB", "8.00 GB", "16.00 GB"]
    assert eighth[:3] == ["1.00 GB", "1.00 GB", "2.00 GB"]
    assert whole[-3:] == ["50.00 GB", "120.00 GB", "48.00 GB"]
    assert eighth[-3:] == ["22.00 GB", "15.00 GB", "6.00 GB"], "each writes its part"


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ([], 1), (["trainer=ddp", "trainer.devices=8"], 1), (["trainer=fsdp"], 1),
        (["trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=2"], 16),
    ],
)  # fmt: skip
def test_how_many_ranks_share(words: list[str], ranks: int) -> None:
    assert doctor.sharded_over(doctor.composed(["+experiment=stage1", *words])) == ranks
