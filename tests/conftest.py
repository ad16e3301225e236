"""The tests are the same wherever they run: what a scheduler or a launcher has set is meant for other processes."""

import os
import shutil

# Before anything imports Lightning, which reads the rank when it is imported.
_PREFIXES = ("SLURM_", "SRUN_", "PMI", "OMPI_", "TORCHELASTIC_", "LSB_", "JSM_", "PL_", "HYDRA_", "ATLAS_LM_")
_NAMES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK", "ROLE_RANK",
    "MASTER_ADDR", "MASTER_PORT", "TZ",
}  # fmt: skip
for _name in [name for name in os.environ if name in _NAMES or name.startswith(_PREFIXES)]:
    del os.environ[_name]

# Two processes run tests: with a thread per core each they would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would print a warning
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if shutil.which("nvidia-smi") is None:  # Triton reads it when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
