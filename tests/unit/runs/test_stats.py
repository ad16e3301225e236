"""Ranks that would resume different checkpoints are refused, all of them, before one restores anything."""

import os
from typing import Any

import lightning
import pytest

from atlas_lm.runs.stats import RunStats
from tests.support.toys import Line, loader
from tests.support.two_ranks import run_on_two_ranks


def fit(source: str | None) -> str:
    trainer: Any = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[RunStats(source=source)],
    )  # fmt: skip
    trainer.fit(Line(), loader(), loader())
    return "begun"


def alike() -> str:
    return fit("run/step-2.ckpt")


def differing() -> str:
    """Rank 1 is shown an older state of the folder."""
    return fit(f"run/step-{2 - int(os.environ['RANK'])}.ckpt")


def one_begins() -> str:
    return fit(None if os.environ["RANK"] == "1" else "run/step-2.ckpt")


@pytest.mark.long
def test_all_ranks_resume_one_checkpoint() -> None:
    same, *others = run_on_two_ranks(alike, differing, one_begins)
    assert same == ["begun", "begun"]
    for result, second in zip(others, ("run/step-1.ckpt", "None"), strict=True):
        for raised, kind, message in result:
            assert (raised, kind) == ("raised", "ValueError")
            assert f"(rank 0: run/step-2.ckpt, rank 1: {second}): give resume=" in message
