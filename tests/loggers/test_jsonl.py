"""metrics.jsonl: one valid JSON object per logged step, whatever was logged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.loggers.jsonl import FIELDS, JsonlLogger, row


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_object_per_step(tmp_path: Path) -> None:
    logger = JsonlLogger(str(tmp_path / "run" / "metrics.jsonl"))
    logger.log_metrics({"train/loss": 2.5, "train/ppl": 12.2}, step=9)
    logger.log_metrics({"val/loss": 3.0}, step=9)
    assert not logger.path.exists()
    logger.log_metrics({"train/loss": 2.0}, step=19)
    assert [line["step"] for line in lines(logger.path)] == [9]
    logger.finalize("failed")
    logger.finalize("failed")
    first, second = lines(logger.path)
    assert (first["lm_loss"], first["perplexity"], first["val/loss"], first["train/loss"]) == (2.5, 12.2, 3.0, 2.5)
    assert (second["step"], second["lm_loss"], second["perplexity"]) == (19, 2.0, None)
    assert "val/loss" not in second


def test_the_fields_of_the_specification_are_always_there() -> None:
    wanted = {
        "step", "lm_loss", "perplexity", "ppl_delta", "gate_mean", "gate_std", "gate_polarised", "niah_accuracy",
        "chunk_size", "clip_threshold", "grad_norm", "tokens_per_second", "rollback_count",
    }  # fmt: skip
    empty = row(3, 0.0, {})
    assert wanted <= set(empty)
    assert [empty[name] for name in wanted - {"step"}] == [None] * (len(wanted) - 1)
    full = row(3, 0.0, {name: float(i) for i, name in enumerate(FIELDS.values())})
    assert [full[field] for field in FIELDS] == list(range(len(FIELDS)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_valid_json_and_is_named(tmp_path: Path, bad: float) -> None:
    logger = JsonlLogger(str(tmp_path / "metrics.jsonl"))
    logger.log_metrics({"train/loss": bad, "optim/lr": 0.1}, step=0)
    logger.finalize("failed")
    (line,) = lines(logger.path)
    assert line["lm_loss"] is None
    assert line["train/loss"] is None
    assert line["nonfinite"] == ["train/loss"]
    assert line["optim/lr"] == 0.1
    assert "nonfinite" not in row(0, 0.0, {"train/loss": 1.0})


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = JsonlLogger(str(tmp_path / "metrics.jsonl"))
        logger.log_metrics({"train/loss": 1.0}, step=step)
        logger.finalize("success")
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
