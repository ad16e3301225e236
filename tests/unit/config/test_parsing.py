"""Configurations of run folders, also of those that older versions wrote."""

from pathlib import Path

import pytest

from atlas_lm.config.parsing import read_config


def test_a_run_of_version_0_1_has_the_keys_of_now(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("callbacks:\n  checkpoint: {keep: 3}\n  chunk_size: {end: 1}\n  interrupt: {}\n")
    assert read_config(path) == {
        "callbacks": {"interrupt": {}, "step_checkpoint": {"keep": 3}, "chunk_size_scheduler": {"end": 1}}
    }


@pytest.mark.parametrize("callbacks", ["null", "[1]", "???", "x", "{}"])
def test_callbacks_of_another_kind_are_left_as_they_are(tmp_path: Path, callbacks: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"callbacks: {callbacks}\n")
    assert list(read_config(path)) == ["callbacks"]
