"""A run as its judge sees it: configuration, report, records, newest checkpoint and data, read when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.checkpoints.listing import intact_checkpoint
from atlas_lm.config.model import ModelConfig
from atlas_lm.config.parsing import CONFIG, check_numbers, read_config, read_json
from atlas_lm.config.validate import check_targets
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.runs.load import load_data
from atlas_lm.training.load import build_module

BATCH = 4  # validation sequences at a time


@dataclass
class RunArtifacts:
    """All properties raise ValueError or OSError, in words for the user, where the run lacks something."""

    run: Path
    decisions: Path
    """Where the chunk sizes are decided."""
    sequences: int = 32
    """Validation sequences that the model is measured on."""

    @cached_property
    def config(self) -> DictConfig:
        """The run's resolved configuration."""
        return read_config(self.run / CONFIG)

    @cached_property
    def model_config(self) -> ModelConfig:
        """The run's `model` group."""
        return ModelConfig(**self.group("model"))

    def group(self, name: str) -> dict[str, Any]:
        """A part of the configuration as a plain container; `name` may have dots."""
        node = OmegaConf.select(self.config, name)
        if not isinstance(node, DictConfig):
            raise ValueError(f"the run has no {name}: this gate needs it, train with it")
        found = OmegaConf.to_container(node, resolve=True)
        assert isinstance(found, dict)
        return {str(key): value for key, value in found.items()}

    def has(self, name: str) -> bool:
        """Whether the configuration has this group."""
        return isinstance(OmegaConf.select(self.config, name), DictConfig)

    def build(self, name: str, **changes: Any) -> Any:
        """The object that a group of the configuration describes, with `changes`. ValueError: a class not allowed."""
        values = {**self.group(name), **changes}
        if "_target_" not in values:
            raise ValueError(f"{name} of the run's {CONFIG} has no _target_")
        check_targets(values, name)
        return instantiate(values)

    @cached_property
    def report(self) -> dict[str, Any]:
        """The run's verdict."""
        path = self.run / "report.json"
        if not path.is_file():
            raise ValueError("the run has no report.json: it still runs, or was killed")
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"report.json is broken ({error})") from None
        if not isinstance(found, dict):
            raise ValueError("report.json is broken: no JSON object")
        check_numbers(found, ("steps",), path)
        return found

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl. ValueError: it does not cover the run from its first step to its last."""
        path = self.run / "metrics.jsonl"
        if not path.is_file():
            raise ValueError("the run has no metrics.jsonl")
        rows = read_rows(path)
        steps, every = (
            int(self.report.get("steps") or 0),
            OmegaConf.select(self.config, "trainer.log_every_n_steps") or 50,
        )
        wrong = uncovered(rows, steps, int(every))
        if wrong:
            raise ValueError(wrong)
        return rows

    @cached_property
    def checkpoint(self) -> Path:
        """The newest intact one."""
        return intact_checkpoint(self.run).path

    @cached_property
    def content(self) -> dict[str, Any]:
        """What the checkpoint holds."""
        return read_checkpoint(self.checkpoint)

    def unfinished(self) -> str | None:
        """Why the run cannot pass any gate: it did not finish, or its last state was not saved. None if it can."""
        try:
            status, steps = self.report.get("status"), self.report.get("steps")
            if status != "finished":
                return f"the run did not finish, it is {status} at step {steps}: {self.report.get('error')}"
            step = self.content.get("global_step")
        except (ValueError, OSError) as error:
            return str(error)
        if step is None or step != steps:
            return f"the newest checkpoint is of step {step}, the run ended at {steps}"
        return None

    @cached_property
    def device(self) -> torch.device:
        """Where the model is measured."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def final_chunks(self) -> tuple[int, ...]:
        """Local chunk sizes that the run ended with, which its checkpoint holds."""
        return tuple(self.content.get("local_chunks") or self.model_config.local_chunks)

    def new_module(self, **optim: Any) -> Any:
        """The checkpoint's model at the final chunk sizes, on the CPU; `optim`: settings to change of its optimizer."""
        module = build_module(self.content, self.checkpoint, **optim)
        if module.memory_shape()[0] < 1:
            raise ValueError("the model has no memory: there is nothing to judge here")
        module.set_local_chunks(self.final_chunks)
        return module

    @cached_property
    def module(self) -> Any:
        """The model to measure, in eval mode on `device`."""
        return self.new_module().to(self.device).eval()

    def data(self, **changes: Any) -> Any:
        """The run's data, loaded in this process."""
        return load_data(self.run, self.content, **changes)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """Validation text on `device`, evenly spread over the split."""
        data = self.data(batch_size=BATCH, val_batch_size=BATCH, val_sequences=self.sequences)
        return [{name: x.to(self.device) for name, x in batch.items()} for batch in data.val_dataloader()]


def uncovered(rows: list[dict[str, Any]], steps: int, every: int) -> str | None:
    """What records lack of a run of `steps` steps that logged its loss every `every`; None if they are complete.

    `step` of a row counts from 0 and continues over rollbacks, so that it may end above `steps`.
    """
    logged = sorted({int(row["step"]) for row in rows if "train/loss" in row})
    if not logged:
        return "metrics.jsonl has no training loss"
    marks = [-1, *logged, max(steps - 1, logged[-1])]
    gaps = [(b - a, a) for a, b in pairwise(marks)]
    gap, after = max(gaps)
    if gap > 2 * every:  # half a line may be missing where a killed run was resumed
        return f"metrics.jsonl is not complete: the run logged every {every} steps, {gap} are missing after {after + 1}"
    return None
