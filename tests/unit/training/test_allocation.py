"""A job of SLURM with other nodes or tasks than asked for is one line; Lightning would raise after the data is read."""

import pytest
from omegaconf import OmegaConf

from atlas_lm.training.trainer import check_allocation


@pytest.mark.parametrize(
    ("given", "nodes", "devices", "message"),
    [
        ({"SLURM_NNODES": "1"}, 2, 1, "trainer.num_nodes=2, and this job has SLURM_NNODES=1: give trainer.num_nodes=1"),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, 2, 8, "or --ntasks-per-node=8"),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}, 2, 8, None),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}, 2, "auto", None),
        ({}, 2, 8, None),
    ],
)
def test_an_allocation_beside_the_settings(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], nodes: int, devices: int | str, message: str | None
) -> None:
    for name in ("SLURM_NNODES", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cfg = OmegaConf.create({"trainer": {"num_nodes": nodes, "devices": devices}})
    if message is None:
        check_allocation(cfg)
        return
    with pytest.raises(ValueError, match=message):
        check_allocation(cfg)
