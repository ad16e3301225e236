"""Parameters and optimizer state sharded over all ranks (FSDP2)."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy


class FullySharded(ModelParallelStrategy):
    """ModelParallelStrategy over all ranks of all machines; its own `auto` means one data-parallel rank per machine."""

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        self._tensor_parallel_size = 1
        super().setup_environment()
