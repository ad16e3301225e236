"""Safeguards for any LightningModule: `from callbacks import SpikeRollback`. What each needs: docs/safeguards.md."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.chunk_size_scheduler import ChunkSizeScheduler
    from callbacks.five_cat_probe import FiveCatProbe
    from callbacks.gate_monitor import GateMonitor
    from callbacks.generation_health import GenerationHealth
    from callbacks.hang_watch import HangWatch
    from callbacks.interrupt import Interrupt
    from callbacks.loss_weight_schedule import LossWeightSchedule
    from callbacks.memory_contribution import MemoryContribution
    from callbacks.memory_horizon import MemoryHorizon
    from callbacks.niah_probe import NiahProbe
    from callbacks.nonfinite_guard import NonfiniteGuard
    from callbacks.outlier_guard import OutlierGuard
    from callbacks.persistent_memory_check import PersistentMemoryCheck
    from callbacks.proactive_clipping import ProactiveClipping
    from callbacks.progress import TrainingProgress
    from callbacks.random_state import RandomState
    from callbacks.rank_agreement import RankAgreement
    from callbacks.spike_rollback import SpikeRollback
    from callbacks.step_checkpoint import StepCheckpoint
    from callbacks.weight_integrity import WeightIntegrity

__all__ = [
    "ChunkSizeScheduler",
    "FiveCatProbe",
    "GateMonitor",
    "GenerationHealth",
    "HangWatch",
    "Interrupt",
    "LossWeightSchedule",
    "MemoryContribution",
    "MemoryHorizon",
    "NiahProbe",
    "NonfiniteGuard",
    "OutlierGuard",
    "PersistentMemoryCheck",
    "ProactiveClipping",
    "RandomState",
    "RankAgreement",
    "SpikeRollback",
    "StepCheckpoint",
    "TrainingProgress",
    "WeightIntegrity",
]

# Imported when they are asked for: a program that takes one safeguard pays for one. The package's own name is not
# written here: a copy under another name works too.
_HOME = {
    "ChunkSizeScheduler": "chunk_size_scheduler",
    "FiveCatProbe": "five_cat_probe",
    "GateMonitor": "gate_monitor",
    "GenerationHealth": "generation_health",
    "HangWatch": "hang_watch",
    "Interrupt": "interrupt",
    "LossWeightSchedule": "loss_weight_schedule",
    "MemoryContribution": "memory_contribution",
    "MemoryHorizon": "memory_horizon",
    "NiahProbe": "niah_probe",
    "NonfiniteGuard": "nonfinite_guard",
    "OutlierGuard": "outlier_guard",
    "PersistentMemoryCheck": "persistent_memory_check",
    "ProactiveClipping": "proactive_clipping",
    "RandomState": "random_state",
    "RankAgreement": "rank_agreement",
    "SpikeRollback": "spike_rollback",
    "StepCheckpoint": "step_checkpoint",
    "TrainingProgress": "progress",
    "WeightIntegrity": "weight_integrity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
