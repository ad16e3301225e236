"""The end of an optimizer step, where it is complete: trained, judged, logged and validated.

Lightning's own saves come before that, in `on_train_batch_end`: a run that dies right after such a save and is resumed
has lost what the loggers were about to get, and the validation that was due. A callback that saves does so here: it
calls `open_step_ends` in `setup` and has the hook

    on_step_end(trainer, pl_module)

which comes after each optimizer step, on all ranks, in the order of the callbacks. While it runs, Lightning's counters
stand as they did in `on_train_batch_end`: a checkpoint of that moment is resumed exactly, in the middle of an epoch, at
its end and after a validation, and what is logged here belongs to the step that has just ended.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer

from callbacks.support.lightning_internals import at_step_ends


@runtime_checkable
class WritesInBackground(Protocol):
    """A plugin for checkpoint files that returns from a save before the file is there."""

    def after_writing(self, action: Callable[[], None]) -> None:
        """Call `action` when the files saved so far are there, perhaps from another thread; never if one failed."""

    def failed(self) -> bool:
        """Whether a write has failed and its error was not raised yet; does not wait."""

    def wait(self) -> None:
        """Until all files are there. Raises the error of one that is not."""


def open_step_ends(trainer: Trainer) -> None:
    """Have this Trainer call `on_step_end` of its callbacks; once, however many of them ask for it."""

    def call_hooks() -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_step_end", None)
            if hook is not None:
                hook(trainer, trainer.lightning_module)

    at_step_ends(trainer, call_hooks)


def flush_records(trainer: Trainer) -> None:
    """Bring what was logged so far to disk, before the checkpoint that counts it as done. A logger may have `flush`."""
    for logger in trainer.loggers:
        flush = getattr(logger, "flush", None)
        if flush is not None:
            flush()


def save(trainer: Trainer, path: Any) -> None:
    """At a step end: records, then the run as it is, as a file; on all ranks.

    The file is there after `wait_for_files`, and for what `after_writing` calls.
    """
    flush_records(trainer)
    trainer.save_checkpoint(path, weights_only=False)


def after_writing(trainer: Trainer, action: Callable[[], None]) -> None:
    """Call `action` when the files saved so far are there: now, unless they are written in the background."""
    plugin = trainer.strategy.checkpoint_io
    if isinstance(plugin, WritesInBackground):
        plugin.after_writing(action)
    else:
        action()


def file_failed(trainer: Trainer, pl_module: Any = None) -> float:
    """A ballot (support/step_vote.py): 1 where a file could not be written in the background."""
    plugin = trainer.strategy.checkpoint_io
    return float(isinstance(plugin, WritesInBackground) and plugin.failed())


def wait_for_files(trainer: Trainer) -> None:
    """Until all that was saved is on the disk. Raises what the disk does."""
    plugin = trainer.strategy.checkpoint_io
    if isinstance(plugin, WritesInBackground):
        plugin.wait()
