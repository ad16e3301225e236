"""train.py on two ranks of this machine (gloo): whole runs, from the command line as a user gives it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atlas_lm.checkpoints.content import CheckpointError
from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.cli import export
from tests.support import ROOT
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, only_run, report_of, write_corpus

TRAIN = ROOT / "train.py"


def run_on_two_ranks(folder: Path, strategy: str, *changes: str, by: tuple[str, ...] = (), **more: str) -> Path:
    """The run folder of four steps; `by`: what starts the processes, `more` of the environment."""
    corpus = write_corpus(folder / "corpus")
    two = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", "precision=32-true"]
    done = subprocess.run(
        [sys.executable, *by, str(TRAIN), "data=text", corpus, *SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, *two, *changes],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **more}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(folder / "outputs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    ways = {"ddp": [], "fsdp": ["model.checkpoint=block"]}  # a block computed again gathers its parameters again
    return {name: run_on_two_ranks(tmp_path_factory.mktemp(name), name, *more) for name, more in ways.items()}


@pytest.mark.slow
def test_sharded_parameters_train_as_whole_ones(runs: dict[str, Path]) -> None:
    """Data parallelism and FSDP2 are the same mathematics: losses of every step, and the weights in the end."""
    ddp, fsdp = (
        [json.loads(line)["lm_loss"] for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
        for name in ("ddp", "fsdp")
    )
    losses = [loss for loss in ddp if loss is not None]
    assert len(losses) == 4
    assert len(set(losses)) == 4
    assert [loss for loss in fsdp if loss is not None] == pytest.approx(losses, rel=1e-5)
    ours, theirs = (read_checkpoint(runs[name] / "checkpoints" / "last.ckpt")["state_dict"] for name in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_torchrun_in_an_allocation_of_slurm(runs: dict[str, Path], tmp_path: Path) -> None:
    """The job has one task, and torchrun's two processes are its ranks; each took itself for the only one."""
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "batch", "SLURM_NTASKS": "1", "SLURM_NNODES": "1",
                  "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
    by = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = run_on_two_ranks(tmp_path, "ddp", by=by, **allocation)
    assert report_of(run)["status"] == "finished"
    ours, theirs = (
        [json.loads(line)["lm_loss"] for line in (r / "metrics.jsonl").read_text().splitlines()]
        for r in (run, runs["ddp"])
    )
    assert ours == theirs


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_on_two_ranks_has_one_report(runs: dict[str, Path], strategy: str) -> None:
    report = report_of(runs[strategy])
    assert report["status"] == "finished"
    assert report["steps"] == 4
    assert report["tokens"] == 4 * 2 * 2 * 32  # steps, ranks, sequences, tokens


@pytest.mark.long
def test_shards_become_one_file_in_a_run_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    export.main([f"run={runs['fsdp']}", "to=checkpoint", f"out={tmp_path / 'whole'}"])
    path = tmp_path / "whole" / "checkpoints" / "step-0000004.ckpt"
    found, sharded = torch.load(path, weights_only=True), read_checkpoint(runs["fsdp"] / "checkpoints" / "last.ckpt")
    assert all(torch.equal(found["state_dict"][name], x) for name, x in sharded["state_dict"].items())
    ddp = torch.load(runs["ddp"] / "checkpoints" / "last.ckpt", weights_only=True)
    assert found["optimizer_states"][0]["state"].keys() == ddp["optimizer_states"][0]["state"].keys()
    for number, moments in ddp["optimizer_states"][0]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(found["optimizer_states"][0]["state"][number][name], value, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "whole" / "config.yaml").read_bytes() == (runs["fsdp"] / "config.yaml").read_bytes()


@pytest.mark.long
def test_a_broken_one_is_not_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["fsdp"], tmp_path / "run", symlinks=True)
    shard = next((tmp_path / "run" / "checkpoints").glob("*.shards/__1_*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for kind in ("checkpoint", "hf"):
        with pytest.raises((CheckpointError, ValueError), match=shard.name):
            export.main([f"run={tmp_path / 'run'}", f"to={kind}", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_muon_of_sharded_parameters_is_muon(tmp_path: Path) -> None:
    """Each matrix is orthogonalised whole, not a rank's rows of it."""
    wide = ["model.dim=64", "model.head_dim=32", "model.memory_hidden=32"]  # matrices of 32 rows and more
    losses = {}
    for name, strategy, optimizer in (("ddp", "ddp", "muon"), ("fsdp", "fsdp", "muon"), ("adamw", "ddp", "adamw")):
        (tmp_path / name).mkdir()
        run = run_on_two_ranks(tmp_path / name, strategy, *wide, f"optim={optimizer}")
        found = [json.loads(line)["lm_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [loss for loss in found if loss is not None]
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=2e-5)
    assert losses["adamw"][-1] != pytest.approx(losses["ddp"][-1], rel=2e-4)
