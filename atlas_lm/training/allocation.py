"""What a job of SLURM was given, beside what the settings ask for."""

import os
from collections.abc import Mapping


def other_allocation(
    nodes: int, devices: int | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, str] | None:
    """What of a job of SLURM is not as asked for, and the remedy; None: nothing. `devices`: ranks on each node."""
    asked = (
        ("trainer.num_nodes", nodes, "SLURM_NNODES", "--nodes"),
        ("trainer.devices", devices, "SLURM_NTASKS_PER_NODE", "--ntasks-per-node"),
    )
    for setting, wanted, variable, option in asked:
        there = environment.get(variable, "")
        if wanted is not None and there.isdecimal() and int(there) != wanted:
            return (
                f"{setting}={wanted}, and this job has {variable}={there}",
                f"{setting}={there}, or {option}={wanted}",
            )
    return None
