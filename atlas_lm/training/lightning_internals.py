"""All private names of Lightning that the package needs, in one file: an upgrade of Lightning is one diff.

`tests/unit/callbacks/test_lightning_internals.py` checks them against the installed version. Written for Lightning 2.6.
What Lightning writes into checkpoint files is a format and stands in `checkpoints/content.py`.
"""

from lightning.pytorch import Trainer


def logging_step(trainer: Trainer) -> int:
    """Lightning's own step of the loggers: optimizer steps so far, those of abandoned timelines included."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def count_recorded_steps(trainer: Trainer, recorded: int) -> None:
    """Set the loggers' step of a Trainer that did not start, as its last step was done when it was saved.

    Lightning returns from such a resume before it counts that step, and its epoch as done.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = recorded
    epochs = trainer.fit_loop.epoch_progress
    if epochs.current.completed < epochs.current.ready:
        epochs.increment_processed()
        epochs.increment_completed()
