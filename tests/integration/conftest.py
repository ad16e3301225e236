"""Working directories for runs, and finished runs that tests share."""

import sys
from pathlib import Path

import pytest

from tests.support.launching import finished_run, with_all_safeguards


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with the command line of train.py without arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


@pytest.fixture(scope="session")
def basic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run named x without safeguards, to be read only."""
    return finished_run(tmp_path_factory.mktemp("basic"), "name=x", "callbacks=basic")


@pytest.fixture(scope="session")
def guarded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with all safeguards of stage 2, judged by the exit gates; to be read only."""
    return with_all_safeguards(
        tmp_path_factory.mktemp("guarded"),
        "callbacks.memory_contribution.every_n_steps=4",
        "callbacks.memory_horizon.every_n_steps=4",
    )
