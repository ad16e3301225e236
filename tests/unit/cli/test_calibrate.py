"""The spike threshold from an observed run (C3)."""

import json
import math
import random
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from atlas_lm.cli import calibrate
from atlas_lm.cli.calibrate import calibrated_threshold, histogram, read_deltas, verdict
from atlas_lm.loggers.jsonl import JsonlLogger
from tests.support import ROOT

NAN, INF = math.nan, math.inf


def noise(scale: float, count: int = 400, seed: int = 0) -> list[float]:
    """Deltas of a steady run."""
    draws = random.Random(seed)
    return [draws.gauss(0, scale) for _ in range(count)]


def make_run(folder: Path, deltas: list[float]) -> Path:
    """A run that measured every second step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: observed\n")
    logger = JsonlLogger(str(folder / "metrics.jsonl"))
    for i, delta in enumerate(deltas):
        logger.log_metrics({"train/loss": 2.0}, step=2 * i)
        logger.log_metrics({"train/loss": 2.0, "spike_rollback/ppl_delta": delta}, step=2 * i + 1)
    logger.finalize("success")
    return folder


def test_p99_plus_one_sigma() -> None:
    deltas = noise(0.03)
    found = calibrated_threshold(deltas)
    ordered = sorted(deltas)
    place = 0.99 * (len(ordered) - 1)
    below = int(place)
    p99 = ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
    mean = sum(deltas) / len(deltas)
    sigma = math.sqrt(sum((delta - mean) ** 2 for delta in deltas) / len(deltas))
    assert 0.05 < p99 < 0.1
    assert found.threshold == pytest.approx(p99 + sigma)
    assert (found.p99, found.sigma) == pytest.approx((p99, sigma))
    assert (found.count, found.nonfinite, found.largest) == (400, 0, max(deltas))
    assert found.p50 == pytest.approx(np.median(deltas))
    assert not found.unstable
    assert not found.rising


@pytest.mark.parametrize("scale", [0.0, 0.001, 0.02])
def test_a_quiet_run_gets_five_percent(scale: float) -> None:
    """Also where p99 + 1 sigma would lie above: the rule looks at p99."""
    found = calibrated_threshold(noise(scale))
    assert found.p99 < 0.05
    assert found.threshold == 0.05
    assert "stable" in verdict(found)[0]
    assert "UNSTABLE" not in verdict(found)[0]


def test_just_below_and_above_five_percent() -> None:
    deltas = [0.0] * 10 + [0.049] * 20
    assert calibrated_threshold(deltas).threshold == 0.05
    higher = calibrated_threshold([*deltas[:-20], *[0.051] * 20])
    assert higher.threshold == pytest.approx(0.051 + higher.sigma)
    assert higher.threshold > 0.07


def test_an_unstable_run_is_called_so_loudly() -> None:
    found = calibrated_threshold(noise(0.06))
    assert found.p99 > 0.1
    assert found.unstable
    assert found.threshold == pytest.approx(found.p99 + found.sigma)
    assert verdict(found)[0].startswith("TRAINING IS UNSTABLE")
    assert not calibrated_threshold(noise(0.03)).unstable


def test_what_is_not_finite_is_counted_and_changes_no_value() -> None:
    deltas = noise(0.03)
    mixed = [NAN, *deltas[:200], INF, -INF, *deltas[200:]]
    clean, found = calibrated_threshold(deltas), calibrated_threshold(mixed)
    assert found.nonfinite == 3
    assert (found.threshold, found.p50, found.p99, found.largest, found.sigma, found.count) == (
        clean.threshold, clean.p50, clean.p99, clean.largest, clean.sigma, clean.count,
    )  # fmt: skip
    assert any("3 more deltas were NaN or infinite" in line for line in verdict(found))
    assert not any("NaN" in line for line in verdict(clean))


@pytest.mark.parametrize("deltas", [[], [0.01] * 19, [0.01] * 19 + [NAN] * 50])
def test_too_few_deltas(deltas: list[float]) -> None:
    finite = sum(map(math.isfinite, deltas))
    with pytest.raises(ValueError, match=rf"^{finite} deltas.*at least 20.*run longer.*every_n_steps"):
        calibrated_threshold(deltas)
    assert calibrated_threshold([0.01] * 20).count == 20


def test_a_rising_perplexity_is_pointed_out() -> None:
    """A falling one, whose deltas rise towards 0 from below, is what training looks like."""
    rising = calibrated_threshold([x + 0.0002 * i for i, x in enumerate(noise(0.01))])
    assert rising.rising
    assert any("rising" in line for line in verdict(rising))
    falling = calibrated_threshold([x - 0.5 * math.exp(-i / 50) for i, x in enumerate(noise(0.01))])
    assert not falling.rising
    assert not any("rising" in line for line in verdict(falling))
    assert sum(calibrated_threshold(noise(0.02, seed=seed)).rising for seed in range(50)) <= 1


def test_deltas_are_read_where_they_were_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [0.01, NAN, 0.0, INF, -0.2])
    found = read_deltas(run / "metrics.jsonl")
    assert [None if math.isnan(delta) else delta for delta in found] == [0.01, None, 0.0, None, -0.2]


def test_the_histogram_has_every_finite_delta_and_marks_the_threshold() -> None:
    deltas = [*noise(0.03), NAN]
    for threshold in (0.05, 0.5):
        lines = histogram(deltas, threshold).splitlines()
        assert sum(int(line.split()[3]) for line in lines) == 400
        (marked,) = [line for line in lines if "threshold" in line]
        low, high = (float(word.rstrip("%")) / 100 for word in (marked.split()[0], marked.split()[2]))
        assert low - 1e-3 <= threshold <= high + 1e-3
        assert max(line.count("█") for line in lines) == calibrate.BAR
        assert all((line.count("█") > 0) == (int(line.split()[3]) > 0) for line in lines)


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn: list[Figure] = []
    save = calibrate.save
    monkeypatch.setattr(calibrate, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    deltas = [*noise(0.03), NAN]
    run = make_run(tmp_path / "outputs" / "observed" / "1", deltas)
    (run.parent / "latest").symlink_to("1")
    calibrate.main(["run=observed"])
    expected = calibrated_threshold(deltas)
    out = capsys.readouterr().out
    override = f"callbacks.spike_rollback.threshold={expected.threshold:.4f}"
    for words in (
        f"threshold: {expected.threshold:.4f}", override, "400 deltas, 1 not finite", f"p50 {expected.p50:.2%}",
        f"p99 {expected.p99:.2%}", f"max {expected.largest:.2%}", "verdict: p99 is", "← threshold",
    ):  # fmt: skip
        assert words in out
    saved = json.loads((run / "calibration.json").read_text())
    assert saved["threshold"] == expected.threshold
    assert (saved["count"], saved["nonfinite"], saved["override"]) == (400, 1, override)
    (axes,) = drawn[0].axes
    assert sum(patch.get_height() for patch in axes.patches) == 400
    assert 100 * expected.threshold in [line.get_xdata()[0] for line in axes.lines]
    assert matplotlib.image.imread(run / "calibration.png")[..., :3].min() < 0.5
    assert not list(run.glob("*.tmp"))


def test_an_unstable_run_ends_well_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", noise(0.08, 60))
    calibrate.main([f"run={run}"])
    assert "verdict: TRAINING IS UNSTABLE" in capsys.readouterr().out
    assert json.loads((run / "calibration.json").read_text())["unstable"] is True


@pytest.mark.parametrize(
    ("deltas", "words"),
    [([0.01] * 5, "run has 5 deltas"), ([], "metrics.jsonl")],
)
def test_a_run_without_enough_is_left_alone(tmp_path: Path, deltas: list[float], words: str) -> None:
    run = make_run(tmp_path / "run", deltas)
    with pytest.raises((ValueError, OSError), match=words):
        calibrate.main([f"run={run}"])
    assert not list(run.glob("calibration*"))


def test_no_such_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "stage1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no run 'stage'.*did you mean 'stage1'"):
        calibrate.main(["run=stage"])


def test_the_printed_override_names_a_setting() -> None:
    config = OmegaConf.load(ROOT / "conf/callbacks/spike_rollback.yaml")
    setting = OmegaConf.select(OmegaConf.create({"callbacks": config}), calibrate.SETTING)
    assert {"threshold", "every_n_steps"} <= set(setting)
