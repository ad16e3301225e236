"""Runs train.py in this process: starting another Python takes seconds."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

import train
from atlas_lm.cli import errors as cli
from atlas_lm.training import module

SMALL_MODEL = [
    "model.dim=16", "model.layers=1", "model.heads=2", "model.head_dim=8", "model.window=8", "model.local_chunks=[4]",
    "model.global_chunk=8", "model.shard=16", "model.rank=4", "model.persistent_keys=4", "model.memory_layers=[0]",
    "model.local_rank=4",
]  # fmt: skip
FEW_STEPS = [
    "optim.total_steps=4", "optim.warmup_steps=1", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1",
    "callbacks.progress.every_n_seconds=0",
]  # fmt: skip
SMALL_DATA = ["data.seq_len=32", "data.batch_size=2", "data.val_sequences=4"]


before_launch: list[Callable[[], None]] = []  # what a test has happen before each


def launch(*overrides: str) -> int:
    """The exit code of `python train.py <overrides>`; runs land in the working directory."""
    for happen in before_launch:
        happen()
    GlobalHydra.instance().clear()
    with patch.object(Hydra, "get_mode", _mode), patch.object(module, "SAMPLE_TOKENS", 8):
        return cli.run(train.main, overrides)


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Whether the configuration asks for a sweep: Hydra composes all of it to find out, and then again to run."""
    if any(word in override for override in overrides for word in ("hydra.mode", "sweep", "hydra.searchpath")):
        return _get_mode(hydra, config_name, overrides)
    return None


_get_mode = Hydra.get_mode


def write_corpus(folder: Path, documents: int = 60) -> str:
    """The override that names a small corpus of text files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog " * 3)
    return f"data.source.files=['{folder}/*.txt']"


def small_run(folder: Path, *overrides: str) -> int:
    """Four steps of a tiny model on a small corpus."""
    corpus = write_corpus(folder / "corpus")
    return launch("data=text", corpus, *SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, *overrides)


def finished_run(folder: Path, *overrides: str) -> Path:
    """The folder of a finished `small_run` started in `folder`, whatever the working directory is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["train.py"])
        assert small_run(folder, *overrides) == 0
    return only_run(folder / "outputs")


def with_all_safeguards(folder: Path, *overrides: str) -> Path:
    """A `finished_run` with all safeguards of stage 2."""
    often = ["callbacks.niah_probe.every_n_steps=2", "callbacks.spike_rollback.every_n_steps=2"]
    longer = ["data.seq_len=48", "callbacks.chunk_size_scheduler.gamma=0.9"]
    return finished_run(folder, "callbacks=stage2", *often, *longer, *overrides)


def report_of(run: Path) -> dict[str, Any]:
    """The run's report.json; NaN and infinity in it are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((run / "report.json").read_text(), parse_constant=refuse)


def only_run(outputs: Path, experiment: str = "*") -> Path:
    """The single run folder below `outputs`/<experiment>/."""
    runs = [path.parent for path in outputs.glob(f"{experiment}/*/config.yaml") if path.parent.name != "latest"]
    assert len(runs) == 1, runs
    return runs[0]


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails with EFBIG, as writing to a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
