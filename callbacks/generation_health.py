"""Let the model write while it trains, and see whether what it does is sound.

Watches:  a generation from fixed held-out prompts, every `every_n_steps` and at the end of training.
Acts:     warns where a health flag is raised, or stops all ranks together (`on_failure: stop`).
Logs:     generation_health/<figure> (the inspector's: entropy, margin, repetition, memory health …; the mean over
          prompts), generation_health/flags (raised, over all prompts), generation_health/step,
          generation_health/overhead_percent (after the first step); the reports lie in `folder`.
Requires: an inspector, which reads the module's own model, and a validation loader.
Source:   seed 003; CoreVital's report.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.support.collectives import mean_over_ranks
from callbacks.support.lightning_internals import accumulates
from callbacks.support.probing import held_out_batch, record, undisturbed
from callbacks.support.ranges import at_least, check, one_of

log = logging.getLogger(__name__)


class Finding(NamedTuple):
    """What an inspector found in one generation. Any tuple of these three will do."""

    figures: Mapping[str, float]
    """Numbers to log."""
    flags: Sequence[str]
    """Raised ones, each as a line that begins with its name."""
    report: str
    """A file's content, as JSON."""


@runtime_checkable
class Inspector(Protocol):
    """All that this callback knows of what inspects."""

    def inspect(self, module: LightningModule, batch: Any) -> Sequence[tuple[Mapping[str, float], Sequence[str], str]]:
        """A finding (`Finding`) for each prompt, made of held-out rows. Draws no random number but from generators of
        its own, or from torch's global one, which is restored. TypeError: it cannot inspect this module."""
        ...


class GenerationUnsound(FloatingPointError):
    """What the model writes shows a fault."""


class GenerationHealth(Callback):
    """Inspects generations; training is left bitwise as it was. ValueError: a value out of its range."""

    survives_rollback = True  # it counts seconds, which a rollback does not bring back

    def __init__(
        self, inspector: Inspector, folder: str, every_n_steps: int = 1000, rows: int = 2, from_step: int = 1,
        on_failure: str = "warn",
    ) -> None:  # fmt: skip
        check(
            "generation_health", every_n_steps=(every_n_steps, at_least(1)), rows=(rows, at_least(1)),
            from_step=(from_step, at_least(0)), on_failure=(on_failure, one_of("warn", "stop")),
        )  # fmt: skip
        if not isinstance(inspector, Inspector):
            raise TypeError(f"generation_health needs an inspector with inspect(module, batch), got {inspector!r}")
        self.inspector, self.folder, self.every_n_steps = inspector, Path(folder), every_n_steps
        self.rows, self.from_step, self.on_failure = rows, from_step, on_failure
        self._batch: Any = None
        self._seconds, self._since = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the prompts, and find out now whether the module can be inspected at all."""
        self._batch = held_out_batch(trainer, self.rows, "generation_health", fewer=True)
        with undisturbed(trainer, pl_module):
            self.inspector.inspect(pl_module, self._batch)
        self._seconds, self._since = 0.0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Inspect if it is time."""
        step = trainer.global_step
        if accumulates(trainer) or step % self.every_n_steps or step < self.from_step:
            return
        self.inspect(trainer, pl_module)

    def inspect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate on every rank, as sharded models need; write on one. GenerationUnsound: a flag, and it may stop."""
        start = time.perf_counter()
        with undisturbed(trainer, pl_module):
            found = [Finding(*finding) for finding in self.inspector.inspect(pl_module, self._batch)]
        flags = [flag for finding in found for flag in finding.flags]
        raised = mean_over_ranks(trainer, torch.tensor(float(len(flags))))  # one verdict for all ranks
        step = trainer.global_step
        if trainer.is_global_zero:
            self._write(step, found)
        self._seconds += time.perf_counter() - start
        values = {f"generation_health/{name}": value for name, value in means(found).items()}
        values |= {"generation_health/flags": float(raised), "generation_health/step": float(step)}
        trained = time.perf_counter() - self._since
        values["generation_health/overhead_percent"] = 100 * self._seconds / max(trained, 1e-9)
        record(trainer, values)
        if float(raised) > 0:
            self._act(trainer, step, flags)

    def _write(self, step: int, found: Sequence[Finding]) -> None:
        """What cannot be written costs a warning: the figures are in the records."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for n, finding in enumerate(found):
                path = self.folder / f"step_{step:08d}_{n}.json"
                temporary = path.with_suffix(".tmp")
                temporary.write_text(finding.report, encoding="utf-8")
                temporary.replace(path)
        except OSError as error:
            log.warning("generation_health: no report of step %d (%s)", step, error)

    def _act(self, trainer: Trainer, step: int, flags: Sequence[str]) -> None:
        named = "; ".join(dict.fromkeys(flags)) or "raised on another rank"
        message = f"generation_health at step {step}: {named}. Reports: {self.folder}"
        if self.on_failure == "stop":
            raise GenerationUnsound(message)
        if trainer.is_global_zero:
            log.warning("%s", message)


def means(found: Sequence[Finding]) -> dict[str, float]:
    """Of every figure, over the prompts that have it."""
    names = dict.fromkeys(name for finding in found for name in finding.figures)
    values = {name: [finding.figures[name] for finding in found if name in finding.figures] for name in names}
    return {name: sum(some) / len(some) for name, some in values.items()}
