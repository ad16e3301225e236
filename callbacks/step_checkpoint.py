"""Keep the newest checkpoints of a run, counted in optimizer steps, the final one included.

Watches:  the step counter.
Acts:     saves every `every_n_steps` and at the end; keeps the newest `keep`; `last.ckpt` links to the newest.
Logs:     nothing.
Requires: any LightningModule.
"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that ranks by step and saves the end of training too.

    ValueError: `every_n_steps` or `keep` below 1.
    """

    def __init__(self, folder: str, every_n_steps: int, keep: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}={value} of the checkpoints must be at least 1")
        super().__init__(
            dirpath=folder,
            filename="step-{step:07d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last="link",
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, unless it was its turn anyway."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run in another folder keeps its own checkpoints and leaves the first run's alone."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)
