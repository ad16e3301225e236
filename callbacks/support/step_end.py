"""The border between two optimizer steps, where a step is complete: trained, judged, logged and validated.

Lightning's own saves come before that, in `on_train_batch_end`: a run that dies right behind such a save and is resumed
has lost what the loggers were about to get, and the validation that was due. A callback that saves does so here: it
calls `open_borders` in `setup` and has the hook

    on_step_border(trainer, pl_module)

which comes behind each optimizer step, on all ranks, in the order of the callbacks. While it runs, Lightning's counters
stand as they did in `on_train_batch_end`: for a checkpoint of that moment its way to resume is exact, in the middle of
an epoch, at its end and behind a validation, and what is logged here belongs to the step that has just ended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer


def open_borders(trainer: Trainer) -> None:
    """Have this Trainer call `on_step_border`; once, however many callbacks ask for it."""
    loop: Any = trainer.fit_loop.epoch_loop
    if getattr(loop, "_has_borders", False):
        return
    end_of_advance = loop.on_advance_end

    def on_advance_end(data_fetcher: Any) -> None:
        if loop._skip_next_val and loop.batch_progress.total.ready == 0:
            loop._skip_next_val = False  # resumed from before the first step: Lightning would count one that was none
            return
        end_of_advance(data_fetcher)
        if not loop._should_accumulate():
            with _as_inside_the_step(loop):
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    hook = getattr(callback, "on_step_border", None)
                    if hook is not None:
                        hook(trainer, trainer.lightning_module)

    loop.on_advance_end, loop._has_borders = on_advance_end, True


@contextmanager
def _as_inside_the_step(loop: Any) -> Iterator[None]:
    """Lightning takes this for a checkpoint written in `on_train_batch_end`, and never repeats its validation."""
    progress = loop.batch_progress
    for count in (progress.total, progress.current):
        count.completed -= 1
    loop._batches_that_stepped -= 1
    try:
        yield
    finally:
        for count in (progress.total, progress.current):
            count.completed += 1
        loop._batches_that_stepped += 1


def flush_records(trainer: Trainer) -> None:
    """Bring what was logged so far to disk, before the checkpoint that counts it as done. A logger may have `flush`."""
    for logger in trainer.loggers:
        flush = getattr(logger, "flush", None)
        if flush is not None:
            flush()


def save(trainer: Trainer, path: Any) -> None:
    """At a border: records, then the run as it is, as a file; on all ranks."""
    flush_records(trainer)
    trainer.save_checkpoint(path, weights_only=False)
