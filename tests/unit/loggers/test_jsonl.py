"""metrics.jsonl: one valid JSON object per logged step, whatever was logged."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.loggers.jsonl import FIELDS, JsonlLogger, read_rows, row


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def log(path: Path, *steps: dict[str, float]) -> None:
    """One run of a logger over these steps."""
    logger = JsonlLogger(str(path))
    for step, metrics in enumerate(steps):
        logger.log_metrics(metrics, step=step)
    logger.finalize("success")


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
        "seq", "step", "global_step", "timeline", "lm_loss", "perplexity", "ppl_delta",
        "gate_mean", "gate_std", "gate_polarised", "niah_accuracy",
        "chunk_size", "clip_threshold", "grad_norm", "tokens_per_second", "rollback_count",
    }  # fmt: skip
    empty = row(3, 0.0, {})
    assert wanted <= set(empty)
    assert {name for name in wanted if empty[name] is not None} == {"seq", "step", "timeline"}
    full = row(3, 0.0, {name: float(i) for i, name in enumerate(FIELDS.values())})
    assert [full[field] for field in FIELDS] == list(range(len(FIELDS)))
    logged_as = {
        "ppl_delta": "spike_rollback/ppl_delta", "niah_accuracy": "niah_probe/accuracy",
        "chunk_size": "chunk_size_scheduler/chunk_size",
        "clip_threshold": "optim/clip_threshold", "rollback_count": "spike_rollback/rollbacks",
    }  # fmt: skip
    for field, metric in logged_as.items():
        assert row(3, 0.0, {metric: 0.5})[field] == 0.5


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


def test_a_rollback_turns_the_optimizer_steps_back_and_the_timeline_forward(tmp_path: Path) -> None:
    done = [{"train/global_step": float(step)} for step in (1, 2, 3, 4)]
    back = {"train/global_step": 2.0, "spike_rollback/timeline": 1.0}
    log(tmp_path / "metrics.jsonl", *done, back, {"train/global_step": 3.0}, {"val/loss": 1.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["seq"] for row in rows] == [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 2, 3, None]
    assert [row["timeline"] for row in rows] == [0, 0, 0, 0, 1, 1, 1], "remembered where it is not logged"


def test_a_timeline_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    log(
        tmp_path / "metrics.jsonl",
        {"spike_rollback/timeline": 2.0},
        {"spike_rollback/timeline": math.nan},
        {"train/loss": 1.0},
    )
    assert [row["timeline"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 2, 2]


def test_a_callback_in_mid_step_and_lightning_after_it_share_a_row(tmp_path: Path) -> None:
    logger = JsonlLogger(str(tmp_path / "metrics.jsonl"))
    logger.log_metrics({"niah_probe/accuracy": 0.9}, step=7)
    logger.log_metrics({"train/loss": 2.0}, step=7)
    logger.finalize("success")
    (only,) = read_rows(logger.path)
    assert (only["niah_accuracy"], only["lm_loss"], only["seq"]) == (0.9, 2.0, 0)


def test_numbers_and_timeline_continue_in_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, {"spike_rollback/timeline": 2.0}, {"train/loss": 1.0})
    log(path, {"train/loss": 1.0}, {"train/loss": 1.0})
    rows = read_rows(path)
    assert [row["seq"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows] == [0, 1, 0, 1]
    assert [row["timeline"] for row in rows] == [2, 2, 2, 2]


@pytest.mark.parametrize("cut", [1, 2, 30, "all but its first byte"])
def test_a_run_continues_after_a_half_written_line(tmp_path: Path, cut: int | str) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, *[{"train/loss": float(i)} for i in range(3)])
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    lost = cut if isinstance(cut, int) else len(last) - 1
    path.write_bytes(whole[:-lost])
    left = [0, 1, 2] if lost == 1 else [0, 1]  # without its end of line alone a row is whole
    assert [row["seq"] for row in read_rows(path)] == left
    log(path, {"train/loss": 9.0}, {"train/loss": 10.0})
    rows = read_rows(path)
    assert [row["seq"] for row in rows] == [*left, len(left), len(left) + 1]
    assert [row["lm_loss"] for row in rows] == [*map(float, left), 9.0, 10.0]
    assert path.read_bytes().startswith(whole[:-lost] + b"\n{"), "nothing that was written is changed"


def test_a_first_line_that_is_half_written_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"seq": 0, "st')
    assert read_rows(path) == []
    log(path, {"train/loss": 1.0})
    assert [row["seq"] for row in read_rows(path)] == [0]


def test_a_file_of_rows_without_numbers_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n{"step": 19}\n')
    log(path, {"train/loss": 1.0})
    assert [row.get("seq") for row in read_rows(path)] == [None, None, 2]


@pytest.mark.parametrize("broken", ['{"seq": 1, "step"', "[1, 2]", "", "\0\0\0"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, *[{"train/loss": 1.0}] * 3)
    first, _, third = path.read_text().splitlines()
    path.write_text("\n".join([first, broken, third]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: no JSON object"):
        read_rows(path)
    path.write_text("\n".join([first, broken]) + "\n")
    assert [row["seq"] for row in read_rows(path)] == [0], "the same as the last line is what a crash leaves"


def test_an_empty_file_has_no_rows_and_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert read_rows(tmp_path / "metrics.jsonl") == []
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "other.jsonl")


def test_ranks_other_than_zero_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log(tmp_path / "metrics.jsonl", {"train/loss": 1.0}, {"train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_a_file_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, {"train/loss": 1.0})
    size, write = path.stat().st_size, os.write

    def fill(handle: int, data: bytes) -> int:
        if os.fstat(handle).st_size > size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:20])

    logger = JsonlLogger(str(path))
    logger.log_metrics({"train/loss": 2.0}, step=1)
    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(OSError, match="No space left"):
        logger.finalize("failed")
    monkeypatch.setattr(os, "write", write)
    assert path.stat().st_size == size + 20, "the line was cut"
    logger.log_metrics({"train/loss": 3.0}, step=2)
    logger.finalize("success")
    assert [(row["seq"], row["lm_loss"]) for row in read_rows(path)] == [(0, 1.0), (1, 3.0)]


def test_rows_beyond_the_checkpoint_are_cut_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(str(path))
    for step in range(5):
        first.log_metrics({"x": step}, step)
    first.flush()
    with path.open("a") as file:
        file.write('{"seq": 5, "half')
    again = JsonlLogger(str(path))
    again.resume_from_step(3)
    for step in range(3, 6):
        again.log_metrics({"x": 10 + step}, step)
    again.finalize("success")
    rows = read_rows(path)
    assert [(row["seq"], row["step"], row["x"]) for row in rows] == [
        (0, 0, 0.0), (1, 1, 1.0), (2, 2, 2.0), (3, 3, 13.0), (4, 4, 14.0), (5, 5, 15.0)
    ]  # fmt: skip
    cut = (tmp_path / "metrics.cut.jsonl").read_text().splitlines()
    assert [line[:10] for line in cut] == ['{"seq": 3,', '{"seq": 4,', '{"seq": 5,']


def test_a_file_that_is_in_order_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(str(path))
    logger.resume_from_step(0)
    assert not path.exists()
    logger.log_metrics({"x": 1}, 0)
    logger.flush()
    before = path.read_bytes()
    logger.resume_from_step(1)
    assert path.read_bytes() == before
    assert not (tmp_path / "metrics.cut.jsonl").exists()


def test_rows_of_version_0_1_have_the_names_of_now(tmp_path: Path) -> None:
    former = {"spike/ppl": 3.0, "niah/accuracy/layer_0": 0.5, "guard/outliers": 2.0, "train/loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"seq": 0, "step": 0, **former}) + "\n")
    (found,) = read_rows(tmp_path / "metrics.jsonl")
    assert found == {
        "seq": 0, "step": 0, "spike_rollback/ppl": 3.0, "niah_probe/accuracy/layer_0": 0.5,
        "outlier_guard/outliers": 2.0, "train/loss": 1.0,
    }  # fmt: skip
