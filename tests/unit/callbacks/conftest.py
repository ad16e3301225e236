"""Training a toy in milliseconds, for callbacks that work with any LightningModule."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from tests.support.toys import STEPS, Line, loader


@pytest.fixture
def fit(tmp_path: Path) -> Any:
    """fit(module, *callbacks, **trainer arguments) trains for STEPS steps and returns the Trainer."""

    def run(module: Line, *callbacks: Any, ckpt_path: Any = None, **changes: Any) -> lightning.Trainer:
        settings: dict[str, Any] = {
            "max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks),
            "enable_progress_bar": any(isinstance(c, lightning.pytorch.callbacks.ProgressBar) for c in callbacks),
            "default_root_dir": tmp_path, "num_sanity_val_steps": 0,
            "limit_val_batches": 0, "log_every_n_steps": 1,
        }  # fmt: skip
        trainer = lightning.Trainer(callbacks=list(callbacks), **{**settings, **changes})
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def line() -> type[Line]:
    return Line


@pytest.fixture
def same_training() -> Any:
    """same_training(a, b) asserts that two Trainers ended with bitwise the same weights and optimizer moments."""

    def compare(a: lightning.Trainer, b: lightning.Trainer) -> None:
        assert a.global_step == b.global_step > 0
        ours, theirs = a.lightning_module.state_dict(), b.lightning_module.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), "the weights differ"
        moments = [
            [value for state in trainer.optimizers[0].state.values() for value in state.values()] for trainer in (a, b)
        ]
        assert len(moments[0]) > 0
        assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True)), "the optimizer's moments differ"

    return compare
