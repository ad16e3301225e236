"""The progress bar, and its lines where the output is no terminal."""

import io
import math
from typing import Any

import pytest
from rich.console import Console

from callbacks import progress
from callbacks.progress import TrainingProgress, clock, compact

METRICS = {"loss": "train/loss", "tokens/s": "perf/never_logged"}


def test_times_and_numbers() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3600, 3723, math.nan, math.inf)] == [
        "0:00", "1:00", "1:01", "1:00:00", "1:02:03", "?", "?",
    ]  # fmt: skip
    assert [compact(v) for v in (0.0, 2.34567, 1234.5, 8_400_000.0)] == ["0", "2.346", "1,234", "8,400,000"]


def test_lines_where_there_is_no_terminal(fit: Any, line: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit(line(), TrainingProgress(METRICS, every_n_seconds=0), val_check_interval=4, limit_val_batches=1)
    lines = capsys.readouterr().out.splitlines()
    steps = [text for text in lines if "loss" in text and "validation" not in text]
    assert len(steps) == 8
    assert steps[0].startswith("step 1/8  loss ")
    assert steps[-1].endswith("ETA 0:00")
    assert not any("tokens/s" in text for text in lines), "what was not logged is not shown"
    assert [text.split("  val/loss")[0] for text in lines if "validation" in text] == [
        "step 4  validation", "step 8  validation",
    ]  # fmt: skip


def test_lines_are_rare_but_the_first_and_the_last_step_always_show(
    fit: Any, line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(line(), TrainingProgress(METRICS, every_n_seconds=1000))
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("step")]
    assert [text.split()[1] for text in lines] == ["1/8", "8/8"], "a sign of life at once, and the end"
    assert lines[0].endswith("ETA ?"), "how long the first step takes says nothing about the others"


def test_a_bar_on_a_terminal(fit: Any, line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda: console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    bar = TrainingProgress(METRICS)
    fit(line(), bar, val_check_interval=4, limit_val_batches=1)
    shown = screen.getvalue()
    assert not bar.plain
    assert "8/8" in shown
    assert "loss" in shown
    assert "Training" in shown


def test_the_bar_counts_steps_over_epochs(fit: Any, line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = TrainingProgress(METRICS, every_n_seconds=1000)
    trainer = fit(line(), bar, max_steps=40, max_epochs=-1)
    assert trainer.current_epoch >= 2
    assert bar.total_train_batches == 40


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_seconds=-1"):
        TrainingProgress(METRICS, every_n_seconds=-1)
