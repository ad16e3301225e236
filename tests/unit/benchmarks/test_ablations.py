"""ablations: every variant is a configuration that exists, in both stages; means are over seeds."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations, worth


@pytest.mark.parametrize("variant", ablations.VARIANTS)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_variant_composes(variant: str, stage: str) -> None:
    of = ablations.VARIANTS[variant]
    cfg = worth.composed(stage, [*of.settings, *(of.second if stage == "stage2" else ())])
    assert cfg.model.memory == "atlas"
    plain = worth.composed(stage, [])
    assert (cfg.model != plain.model) is (not variant.startswith("as it is"))
    assert ("chunk_size_scheduler" in cfg.callbacks) is (stage == "stage2" and not of.second)


def test_stage_2_starts_from_its_own_stage_1_and_reads_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[Any, ...]] = []

    def train(s: Any, name: str, steps: int, rate: float, seed: int, what: str) -> dict[str, Any]:
        made.append((s.experiment, tuple(s.extra), steps, seed))
        bits = 1.0 + 0.1 * (seed % 100) - 0.05 * (s.experiment == "stage2")
        return {"run": f"runs/{what} {seed}", "val_bits_per_byte": bits, "context_gain": 0.1}

    monkeypatch.setattr(worth, "train", train)
    ablations.main(["--seeds", "3", "--variants", "no local memory", "--out", str(tmp_path), "--set", "model.rank=63"])
    settings = ("model.rank=63", "model.local_chunks=[]")
    second = (*settings, *ablations.NO_SCHEDULE)
    assert made[:2] == [
        ("stage1", settings, 1000, 0),
        ("stage2", (*second, "init_from=runs/stage1 no local memory 0"), 440, 100),
    ]
    assert [seed for *_, seed in made] == [0, 100, 1, 101, 2, 102]
    assert "| no local memory | 1.100 ± 0.248 | 1.050 ± 0.248 |  |  | +0.100 |" in capsys.readouterr().out


def test_one_seed_has_no_interval() -> None:
    pair = ({"val_bits_per_byte": 1.2, "context_gain": 0.1}, {"val_bits_per_byte": 1.1})
    (row,) = ablations.summary({"as it is": [pair]})
    assert ablations.table([row]).splitlines()[-1] == "| as it is | 1.200 | 1.100 |  |  | +0.100 |"


def test_differences_are_those_of_the_same_seeds() -> None:
    """Seeds differ by far more than the variants do, and always by the same."""

    def pairs(*values: float) -> list[tuple[dict[str, float], dict[str, float]]]:
        return [({"val_bits_per_byte": x, "context_gain": 0.1}, {"val_bits_per_byte": x - 0.1}) for x in values]

    _, row = ablations.summary({"as it is": pairs(1.0, 2.0, 3.0), "no local memory": pairs(1.01, 2.02, 3.03)})
    mean, half = row.differs_before
    assert mean == pytest.approx(0.02)
    assert half == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert row.differs_after == pytest.approx(row.differs_before)
    assert "| +0.0200 ± 0.0248 | +0.0200 ± 0.0248 |" in ablations.table([row._replace(variant="as it is"), row])


def test_a_gain_that_was_not_measured_is_a_dash() -> None:
    pair = ({"val_bits_per_byte": 1.2, "context_gain": None}, {"val_bits_per_byte": 1.1})
    assert ablations.table(ablations.summary({"as it is": [pair]})).endswith("| 1.100 |  |  | – |")


def test_settings_are_composed_in_several_threads_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: worth.composed("stage1", [f"seed={n}"]).seed, range(8)))
    assert found == list(range(8))
