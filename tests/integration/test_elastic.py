"""A run is resumed on another number of ranks, or by another strategy: the same samples, the same losses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_lm.checkpoints.io import read_checkpoint
from tests.support import ROOT
from tests.support.launching import SMALL_DATA, SMALL_MODEL, only_run, write_corpus
from tests.support.seen_batches import seen

TRAIN = ROOT / "train.py"
BATCH, STEPS = 4, 12  # sequences of all ranks together
ENDS = (4, 8)  # steps after which the run is stopped, and continues on others
FIXED = [
    *SMALL_MODEL, *SMALL_DATA, "optim.total_steps=12", "optim.warmup_steps=1",
    "trainer.log_every_n_steps=1", "trainer.val_check_interval=12", "precision=32-true", "callbacks=basic",
    "trainer.accelerator=cpu", "+callbacks.seen_batches._target_=tests.support.seen_batches.SeenBatches",
]  # fmt: skip


def files(folder: Path) -> list[str]:
    return ["data=text", write_corpus(folder / "corpus")]


def mixture(folder: Path) -> list[str]:
    """A dataset that is read on the fly, and files in memory."""
    corpus = write_corpus(folder / "corpus").partition("=")[2]
    (folder / "rows").mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"row {i} of many " * (1 + i % 7)}) for i in range(300)]
    (folder / "rows" / "train.jsonl").write_text("\n".join(lines) + "\n")
    large = f"{{_target_: atlas_lm.data.hf.HuggingFaceSource, path: '{folder / 'rows'}', streaming: true}}"
    small = f"{{_target_: atlas_lm.data.text.TextSource, files: {corpus}}}"
    return [
        "data=mix", "~data.source.sources.stdlib", f"+data.source.sources.large={{weight: 2, source: {large}}}",
        f"+data.source.sources.small={{weight: 1, source: {small}}}",
    ]  # fmt: skip


def train(folder: Path, topology: str, last: int, data: Callable[[Path], list[str]] = files) -> None:
    """Up to step `last` in `folder`. `topology`: ddp2 is two ranks of trainer=ddp."""
    strategy, ranks = re.fullmatch(r"([a-z]+)(\d)", topology).groups()  # type: ignore[union-attr]
    command = [
        sys.executable, str(TRAIN), *FIXED, *data(folder), "name=x", f"trainer={strategy}", f"trainer.devices={ranks}",
        f"data.batch_size={BATCH // int(ranks)}", f"trainer.max_steps={last}",
        *(["resume=x"] if (folder / "outputs").exists() else []),
        f"+callbacks.seen_batches.folder={folder / 'seen'}",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{topology}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process from the first step to the last."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, "cpu1", STEPS)
    return folder


@pytest.mark.parametrize(
    "topologies",
    [
        "ddp2 cpu1 ddp4", "fsdp2 fsdp1 fsdp4",
        "cpu1 fsdp2 ddp2", "fsdp4 cpu1 fsdp2", "ddp2 fsdp2 ddp1",
    ],
)  # fmt: skip
@pytest.mark.slow
def test_other_ranks_and_strategies(whole: Path, tmp_path: Path, topologies: str) -> None:
    for topology, last in zip(topologies.split(), (*ENDS, STEPS), strict=True):
        train(tmp_path, topology, last)
    ours, theirs = seen(tmp_path / "seen"), seen(whole / "seen")
    assert len(theirs) == STEPS
    assert {step: s.rows for step, s in ours.items()} == {step: s.rows for step, s in theirs.items()}
    assert [s.loss for s in ours.values()] == pytest.approx([s.loss for s in theirs.values()], abs=1e-6)
    last = "checkpoints/last.ckpt"
    a, b = (read_checkpoint(only_run(folder / "outputs") / last)["state_dict"] for folder in (tmp_path, whole))
    assert a.keys() == b.keys()
    assert all((a[name] - b[name]).abs().max() < 1e-4 for name in b)


@pytest.mark.slow
def test_the_same_ranks_are_bitwise_the_same(tmp_path: Path) -> None:
    for name, ends in (("whole", (STEPS,)), ("cut", (*ENDS, STEPS))):
        (tmp_path / name).mkdir()
        for last in ends:
            train(tmp_path / name, "fsdp2", last)
    assert seen(tmp_path / "cut" / "seen") == seen(tmp_path / "whole" / "seen")


@pytest.mark.slow
def test_a_mixture_that_is_read_on_the_fly(tmp_path: Path) -> None:
    for name, topologies in (("whole", ["cpu1"]), ("cut", ["ddp2", "fsdp4", "cpu1"])):
        (tmp_path / name).mkdir()
        for topology, last in zip(topologies, (*ENDS, STEPS)[-len(topologies) :], strict=True):
            train(tmp_path / name, topology, last, mixture)
    ours, theirs = seen(tmp_path / "cut" / "seen"), seen(tmp_path / "whole" / "seen")
    assert len({row for step in theirs.values() for row in step.rows}) > 40
    assert {step: s.rows for step, s in ours.items()} == {step: s.rows for step, s in theirs.items()}
    assert [s.loss for s in ours.values()] == pytest.approx([s.loss for s in theirs.values()], abs=1e-6)
