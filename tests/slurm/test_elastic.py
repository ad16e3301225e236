"""A run of two ranks continues on one and then on four, as jobs of a real SLURM: the same samples, the same losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_elastic import BATCH, ENDS, FIXED, STEPS, files
from tests.support import ROOT
from tests.support.seen_batches import seen

pytestmark = pytest.mark.slurm

TOPOLOGIES = ((2, 1), (1, 1), (2, 2))  # nodes, ranks on each


def train(folder: Path, strategy: str, nodes: int, devices: int, last: int) -> None:
    """Up to step `last` in `folder`, in a job of its own."""
    command = [
        sys.executable, "train.py", *FIXED, *files(folder), "name=x", "launcher=slurm", f"trainer={strategy}",
        "trainer.accelerator=cpu", f"trainer.num_nodes={nodes}", f"trainer.devices={devices}",
        f"data.batch_size={BATCH // (nodes * devices)}", f"trainer.max_steps={last}",
        f"paths.outputs={folder / 'outputs'}", f"+callbacks.seen_batches.folder={folder / 'seen'}",
    ]  # fmt: skip
    if (folder / "outputs" / "x").exists():
        (run,) = [path for path in (folder / "outputs" / "x").iterdir() if not path.is_symlink()]
        command.append(f"resume={run}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    logs = "".join(path.read_text()[-2000:] for path in (folder / "outputs" / ".slurm").rglob("*.out"))
    assert done.returncode == 0, f"{nodes} × {devices} {strategy}\n{done.stderr[-2000:]}\n{logs}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_then_one_then_four(slurm: Path, tmp_path: Path, strategy: str) -> None:
    fixed, elastic = tmp_path / "fixed", tmp_path / "elastic"
    fixed.mkdir()
    elastic.mkdir()
    train(fixed, strategy, *TOPOLOGIES[0], STEPS)
    for topology, last in zip(TOPOLOGIES, (*ENDS, STEPS), strict=True):
        train(elastic, strategy, *topology, last)
    ours, theirs = seen(elastic / "seen"), seen(fixed / "seen")
    assert len(theirs) == STEPS
    # the rows of a step are the hashes of all processes' samples
    assert {step: s.rows for step, s in ours.items()} == {step: s.rows for step, s in theirs.items()}
    assert [s.loss for s in ours.values()] == pytest.approx([s.loss for s in theirs.values()], abs=1e-6)
