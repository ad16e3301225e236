"""What a run's report needs to know and Lightning forgets: times, tokens, the last validation, how it ended."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from atlas_lm.loggers.jsonl import current_name
from atlas_lm.training.lightning_internals import count_recorded_steps

METRICS = "callback_metrics"


class RunStats(Callback):
    """Counts over interruptions: its counters travel in the checkpoint.

    `held_out`: says what validation measures; another run's figure is not taken over where that differs.
    `at_start`: called when training starts, before any other callback: nothing has refused it.
    `source`: the checkpoint that this rank resumes; each rank finds it by itself, and a filesystem may show one of them
    an older state, or a scheduler answer one of them alone.
    """

    survives_rollback = True  # what was spent stays spent
    state_key = "RunRecorder"  # under which checkpoints of all versions have it

    def __init__(
        self, held_out: str = "", at_start: Callable[[], None] | None = None, source: str | None = None
    ) -> None:
        self.held_out, self.source = held_out, source
        self.at_start = at_start
        self.has_begun = False  # training
        self.tokens = 0  # input tokens trained on, all ranks together
        self.validation: dict[str, float] = {}  # the last validation's metrics
        self.training: dict[str, float] = {}  # what callbacks and module had logged when training ended
        self.validated_at: int | None = None  # optimizer step of the last validation
        self.error: BaseException | None = None
        self._seconds = {"train": 0.0, "validation": 0.0}
        self._since: dict[str, float] = {}
        self._restored: dict[str, float] = {}  # metrics of a resumed run, until it starts

    @property
    def train_seconds(self) -> float:
        """Wall time from the first step on, validations and checkpoints included."""
        return self._elapsed("train")

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens over the time outside validations; None before the first step."""
        seconds = self.train_seconds - self._elapsed("validation")
        return self.tokens / seconds if self.tokens and seconds > 0 else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """ValueError on all ranks where they would resume different checkpoints: weights would be made alike, and
        optimizer, data and records not."""
        if stage != "fit" or trainer.world_size == 1:
            return
        sources: list[str | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(sources, self.source)
        if len(set(sources)) > 1:
            found = ", ".join(f"rank {rank}: {source}" for rank, source in enumerate(sources))
            raise ValueError(f"ranks would resume different checkpoints ({found}): give resume=<the run folder>")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock. A resumed run shows its callbacks the metrics that the whole one would show them."""
        self._start("train")
        self._begin()
        if self._restored:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._restored.items()})
            self._restored = {}

    def skip_training(self, trainer: Trainer, recorded: int) -> None:
        """The checkpoint is of the last step, so Lightning does not start: what it had logged is what there is.

        `recorded`: steps in the loggers. Lightning leaves before it counts them.
        """
        count_recorded_steps(trainer, recorded)
        self._begin()
        self.training = self._restored

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What callbacks see of the metrics at this moment."""
        checkpoint[METRICS] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """They are set when training starts; a rollback leaves them: what was measured stays measured."""
        if "train" not in self._since:
            self._restored = {current_name(name): value for name, value in checkpoint.get(METRICS, {}).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of this batch; every rank's batch is equally large."""
        items = batch["input_ids"] if "input_ids" in batch else batch["scored"]  # of embedded text: frames
        self.tokens += items.numel() * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting training time."""
        if "train" in self._since:
            self._start("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what validation found."""
        self._stop("validation")
        if not trainer.sanity_checking:
            self.validation = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.validated_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop("train")
        self._remember(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remember why the run ended."""
        self.error = exception
        self._stop("validation")
        self._stop("train")
        self._remember(trainer)

    def _remember(self, trainer: Trainer) -> None:
        self.training = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters up to now, and the last validation: a run that dies after its last step does not repeat it."""
        return {
            "tokens": self.tokens,
            "seconds": {name: self._elapsed(name) for name in self._seconds},
            "validation": (self.held_out, self.validated_at, dict(self.validation)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.tokens = state_dict["tokens"]
        self._seconds = dict(state_dict["seconds"])
        held_out, at, found = state_dict.get("validation", ("", None, {}))  # older checkpoints have none
        if held_out == self.held_out:
            self.validated_at, self.validation = at, dict(found)

    def _begin(self) -> None:
        self.has_begun = True
        if self.at_start is not None:
            self.at_start()

    def _start(self, name: str) -> None:
        self._since[name] = time.monotonic()

    def _stop(self, name: str) -> None:
        self._seconds[name] = self._elapsed(name)
        self._since.pop(name, None)

    def _elapsed(self, name: str) -> float:
        since = self._since.get(name)
        return self._seconds[name] + (time.monotonic() - since if since is not None else 0.0)
