"""A real SLURM of two nodes on this machine, for as long as the tests run."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cluster's folder; SLURM's commands find it by SLURM_CONF."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None or os.geteuid() != 0:
        pytest.skip("needs slurm-wlm and munge, and root: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("cluster")
    up = subprocess.run([HERE / "up.sh", folder], capture_output=True, text=True, timeout=120)
    assert up.returncode == 0, up.stderr
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield folder
    finally:
        subprocess.run([HERE / "down.sh", folder], capture_output=True, timeout=60)
        del os.environ["SLURM_CONF"]
