"""All private names of Lightning that safeguards need, in one file: an upgrade of Lightning is one diff.

Each function says what it relies on; `tests/unit/callbacks/test_lightning_internals.py` checks each against the
installed version. Written for Lightning 2.6.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call

# names in a checkpoint's loop state
OPTIMIZER_PROGRESS = "epoch_loop.automatic_optimization.optim_progress"
SCHEDULER_PROGRESS = "epoch_loop.scheduler_progress"
STEPPED = "_batches_that_stepped"  # the loop's name for the loggers' step, also in a checkpoint's loop state


def accumulates(trainer: Trainer) -> bool:
    """Whether this micro-batch is followed by more of its optimizer step. In `on_train_batch_end` and before."""
    return trainer.fit_loop._should_accumulate()


def logging_step(trainer: Trainer) -> int:
    """Lightning's own step of the loggers: optimizer steps so far, those of abandoned timelines included."""
    return getattr(trainer.fit_loop.epoch_loop, STEPPED)


def is_logging_step(trainer: Trainer) -> bool:
    """Whether Lightning gives the values of this step to the loggers."""
    return (logging_step(trainer) + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def logged_steps(stepped: int, completed: int, processed: int) -> int:
    """Number of the first logging step that is not recorded yet. The arguments are the loop's counters.

    Lightning's own rule: where a step was not complete when it was saved, its number has not been counted up yet.
    """
    return stepped + (completed < processed)


def load_checkpoint_hooks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Call every callback's `on_load_checkpoint`."""
    call._call_callbacks_on_load_checkpoint(trainer, checkpoint)


def restore_all_but_loops(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Model, precision, optimizers and schedulers from what the strategy has loaded, in the order of a resume: the
    callbacks' `on_load_checkpoint` comes after the model, as averaged weights are in its place in the file."""
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    try:
        connector.restore_model()
        load_checkpoint_hooks(trainer, checkpoint)
        connector.restore_precision_plugin_state()
        connector.restore_optimizers_and_schedulers()
    finally:
        connector._loaded_checkpoint = {}


def forget_last_save(callback: Any) -> None:
    """Have a checkpoint callback save again at a step at which it has saved before."""
    if hasattr(callback, "_last_global_step_saved"):
        callback._last_global_step_saved = 0


def at_step_ends(trainer: Trainer, call_hooks: Callable[[], None]) -> None:
    """Call `call_hooks` after each complete optimizer step, validation included; once, whoever asks again.

    While it runs, Lightning's counters stand as they did in `on_train_batch_end`.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if getattr(loop, "_has_step_ends", False):
        return
    end_of_advance = loop.on_advance_end

    def on_advance_end(data_fetcher: Any) -> None:
        if loop._skip_next_val and loop.batch_progress.total.ready == 0:
            loop._skip_next_val = False  # resumed from before the first step: Lightning would count one that was none
            return
        end_of_advance(data_fetcher)
        if not loop._should_accumulate():
            with _as_inside_the_step(loop):
                call_hooks()

    loop.on_advance_end, loop._has_step_ends = on_advance_end, True


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


def raise_after_teardown(trainer: Trainer, error: Exception, cause: BaseException) -> None:
    """Have `fit` raise `error` from `cause`, once everything has learned of `cause`: there is no public way."""
    teardown = trainer._teardown

    def teardown_and_raise() -> None:
        del trainer._teardown  # this function, not the method
        try:
            teardown()
        finally:
            raise error from cause

    trainer._teardown = teardown_and_raise  # type: ignore[method-assign]
