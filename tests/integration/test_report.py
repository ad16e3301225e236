"""The report tells the truth about good, bad, interrupted and failed runs."""

import bz2
import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm.runs.report import (
    LEAST_BYTES,
    bits_per_byte,
    compressed_bits_per_byte,
    finite,
    markdown,
    quality,
    shown,
    status_of,
    verdict,
)
from atlas_lm.runs.resolve import resolve_run
from atlas_lm.training.module import AtlasModule
from tests.support.launching import only_run, report_of, small_run

KEYS = {
    "val_loss", "val_bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "tokens_per_second", "train_seconds",
    "steps", "checkpoint", "parameters", "verdict",
}  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    good = {
        "status": "finished", "val_loss": 1.2, "val_bits_per_byte": 1.8, "gzip_bits_per_byte": 2.0,
        "xz_bits_per_byte": 1.7, "steps": 100, "total_steps": 100, "validated_at_step": 100, "error": None,
        "verdict": "",
    }  # fmt: skip
    return {**good, **changes}


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256), tokens=100, n_bytes=100) == pytest.approx(8)
    assert bits_per_byte(math.log(2), tokens=100, n_bytes=400) == pytest.approx(0.25)


def test_compressors_are_those_of_the_command_line() -> None:
    raw = Path(bz2.__file__).read_bytes()
    found = compressed_bits_per_byte(raw)
    assert found["gzip_bits_per_byte"] == 8 * len(gzip.compress(raw, compresslevel=9)) / len(raw)
    extreme = lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    assert found["xz_bits_per_byte"] == 8 * len(extreme) / len(raw)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_bits_per_byte": 8.0}, ["finished: 8.000 bits per byte", "useless"]),
        ({"context_gain": -0.01, "context_gain_low": -0.03}, ["finished: 1.800", "NOT used", "-0.0100"]),
        ({}, ["finished: 1.800 bits per byte", "10.0% below gzip -9 (2.000)", "5.9% ABOVE xz -9e (1.700)"]),
        ({"val_bits_per_byte": 2.5}, ["25.0% ABOVE gzip -9"]),
        ({"val_loss": None, "val_bits_per_byte": None}, ["not finite"]),
        ({"validated_at_step": None}, ["never validated"]),
        ({"status": "interrupted", "steps": 7}, ["interrupted at step 7 of 100", "(validated at step 100)"]),
        ({"status": "stopped early", "steps": 50}, ["stopped early at step 50 of 100"]),
        ({"status": "failed", "steps": 7, "error": "E: no"}, ["FAILED at step 7 of 100: E: no"]),
        ({"val_bits_per_byte": None, "recall_accuracy": 0.97, "recall_chance": 0.016}, ["recall 0.970, chance 0.016"]),
        ({"val_bits_per_byte": None}, ["validation loss 1.2"]),
    ],
)
def test_verdicts(changes: dict[str, Any], words: list[str]) -> None:
    for word in words:
        assert word in verdict(report(**changes))


def test_a_memory_that_is_used_or_was_not_measured_needs_no_words() -> None:
    for changes in ({}, {"context_gain": 0.2, "context_gain_low": 0.1}, {"context_gain": None}):
        assert "NOT used" not in verdict(report(**changes))


def test_a_small_held_out_text_is_not_compared_with_compressors() -> None:
    values: dict[str, Any] = {"val_bits_per_byte": 4.0, "gzip_bits_per_byte": 5.2, "xz_bits_per_byte": 9.9}
    said = quality({**values, "val_bytes": 127})
    assert "4.000 bits per byte" in said
    assert "127 bytes are too few to compare with gzip and xz" in said
    assert "below" not in said
    assert "23.1% below gzip" in quality({**values, "val_bytes": LEAST_BYTES})


def test_status() -> None:
    assert status_of(None, 10, 10) == "finished"
    assert status_of(None, 9, 10) == "stopped early"
    assert status_of(KeyboardInterrupt(), 9, 10) == "interrupted"
    assert status_of(ValueError(), 9, 10) == "failed"


def test_values_in_tables() -> None:
    assert [shown(value) for value in (None, 0.123456, 12345.678, 12345, "a")] == [
        "–", "0.1235", "12,345.7", "12,345", "a",
    ]  # fmt: skip
    assert finite(math.nan) is finite(math.inf) is None
    assert finite(0.0) == 0.0


# Through train.py


def test_a_finished_run(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_run(in_tmp, "name=x") == 0
    run = only_run(in_tmp / "outputs")
    found = report_of(run)
    assert set(found) >= KEYS
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["val_loss"] == pytest.approx(logged[-1]["val/loss"])
    assert found["val_bits_per_byte"] == pytest.approx(logged[-1]["val/bits_per_byte"], rel=1e-5)
    assert [line["lm_loss"] is not None for line in logged[:4]] == [True] * 4
    assert found["status"] == "finished"
    assert found["steps"] == 4
    assert found["tokens"] == 4 * 2 * 32
    assert found["val_bits_per_byte"] == pytest.approx(found["val_loss"] / math.log(2), rel=0.05)  # a byte a token
    assert found["tokens_per_second"] > found["tokens"] / found["train_seconds"] > 0
    assert Path(found["checkpoint"]).is_file()
    captured = capsys.readouterr()
    page, printed = (run / "report.md").read_text(), captured.out
    assert captured.err.count("max_steps=4` reached") == 1, "every message comes once"
    assert page == markdown(found)
    assert found["verdict"] in page
    assert f"verdict: {found['verdict']}" in printed
    assert f"checkpoint: {found['checkpoint']}" in printed
    assert (in_tmp / "outputs" / "x" / "latest").resolve() == run.resolve()
    assert "precision: " in next(run.glob("*.log")).read_text()
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "train.log"):
        assert (run / name).exists(), name


def test_the_last_step_is_validated_even_when_it_is_not_its_turn(in_tmp: Path) -> None:
    assert small_run(in_tmp, "trainer.val_check_interval=3") == 0
    assert report_of(only_run(in_tmp / "outputs"))["validated_at_step"] == 4


def test_a_model_that_validates_to_nan_is_not_praised(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = AtlasModule.validation_step

    def poisoned(self: Any, *arguments: Any) -> Any:
        with torch.no_grad():
            next(iter(self.parameters())).fill_(math.nan)
        return step(self, *arguments)

    monkeypatch.setattr(AtlasModule, "validation_step", poisoned)
    assert small_run(in_tmp, "trainer.num_sanity_val_steps=0") == 0
    found = report_of(only_run(in_tmp / "outputs"))
    assert found["val_loss"] is None
    assert found["val_bits_per_byte"] is None
    assert "not finite" in found["verdict"]


def test_a_failed_run_reports_and_is_not_the_latest(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AtlasModule.training_step

    def poisoned(self: Any, batch: Any, index: int) -> Any:
        loss = step(self, batch, index)
        return loss * math.nan if self.global_step == 2 else loss

    monkeypatch.setattr(AtlasModule, "training_step", poisoned)
    at_once = "callbacks.nonfinite_guard.max_consecutive=0"
    assert small_run(in_tmp, "name=x", "callbacks.step_checkpoint.every_n_steps=1", at_once) == 1
    error = capsys.readouterr().err
    assert "error: NaN or infinity in step 2 (loss on rank 0; gradient on rank 0)" in error
    assert "lower optim.lr" in error
    assert "Traceback" not in error
    found = report_of(only_run(in_tmp / "outputs"))
    assert found["status"] == "failed"
    assert found["steps"] == 2
    assert "NonFiniteTraining" in found["verdict"]
    assert not (in_tmp / "outputs" / "x" / "latest").exists()
    with pytest.raises(ValueError, match="no finished run"):
        resolve_run("x")


def test_a_report_that_cannot_be_written_does_not_hide_why_the_run_failed(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    def broken(self: Any, batch: Any, index: int) -> Any:
        raise FloatingPointError("the reason")

    monkeypatch.setattr("atlas_lm.runs.report.write_atomically", full)
    monkeypatch.setattr(AtlasModule, "training_step", broken)
    assert small_run(in_tmp) == 1
    error = capsys.readouterr().err
    assert "error: the reason" in error
    assert "the report could not be written: [Errno 28] No space left on device" in error
