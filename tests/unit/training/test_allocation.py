"""A job of SLURM with other nodes or tasks than asked for is one line; Lightning would raise after the data is read."""

import pytest

from atlas_lm.training.trainer import check_allocation


def job(nodes: int, tasks: int, **more: str) -> dict[str, str]:
    return {"SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(tasks), **more}


@pytest.mark.parametrize(
    ("given", "nodes", "devices", "message"),
    [
        (job(1, 1), 2, 1, "trainer.num_nodes=2, and this job has SLURM_NNODES=1: give trainer.num_nodes=1"),
        (job(2, 8, SLURM_NTASKS_PER_NODE="4"), 2, 8, "or --ntasks-per-node=8"),
        (job(2, 16, SLURM_NTASKS_PER_NODE="8", SLURM_STEP_ID="0"), 2, 8, None),
        (job(2, 16, SLURM_NTASKS_PER_NODE="8", SLURM_STEP_ID="0"), 2, "auto", None),
        (job(2, 16, SLURM_NTASKS_PER_NODE="8"), 2, 8, "no task of srun: start it by srun"),
        (job(1, 1), 1, 8, "8 ranks are asked for .* --ntasks-per-node=8"),
        (job(1, 8), 1, 1, "1 ranks are asked for .* trainer.devices=8"),
        (job(1, 8), 1, 8, "does not say how many on a node: give --ntasks-per-node=8"),
    ],
)
def test_an_allocation_beside_the_settings(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], nodes: int, devices: int | str, message: str | None
) -> None:
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if message is None:
        check_allocation(nodes, devices)
        return
    with pytest.raises(ValueError, match=message):
        check_allocation(nodes, devices)
