"""What a job of SLURM was given, beside what the settings ask for."""

import os
from collections.abc import Mapping


def other_allocation(
    nodes: int, devices: int | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, str] | None:
    """What of a job of SLURM is not as asked for, and the remedy; None: nothing. `devices`: ranks on each node, None
    where that is not known."""

    def given(name: str) -> int | None:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else None

    asked = (
        ("trainer.num_nodes", nodes, "SLURM_NNODES", "--nodes"),
        ("trainer.devices", devices, "SLURM_NTASKS_PER_NODE", "--ntasks-per-node"),
    )
    for setting, wanted, variable, option in asked:
        there = given(variable)
        if wanted is not None and there is not None and there != wanted:
            return (
                f"{setting}={wanted}, and this job has {variable}={there}",
                f"{setting}={there}, or {option}={wanted}",
            )
    tasks = given("SLURM_NTASKS")
    if tasks is None:
        return None
    each = max(1, tasks // nodes)
    if devices is not None and tasks != nodes * devices:
        return (
            f"{nodes * devices} ranks are asked for (trainer.num_nodes × trainer.devices), and this job has "
            f"SLURM_NTASKS={tasks}",
            f"--ntasks-per-node={devices}, or trainer.devices={each}",
        )
    if tasks > 1 and not environment.get("SLURM_NTASKS_PER_NODE"):
        return f"this job has {tasks} tasks, and does not say how many on a node", f"--ntasks-per-node={each}"
    return None
