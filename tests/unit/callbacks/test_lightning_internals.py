"""The private names of Lightning that safeguards rely on still mean what they did; and they stand in one file alone."""

import re
from pathlib import Path
from typing import Any

import lightning
import pytest

from callbacks.support import lightning_internals as internals
from tests.support.toys import Line, Lines

ROOT = Path(internals.__file__).parents[2]
WALLS = {  # where private names of Lightning may stand; content.py has what is written into checkpoint files
    "callbacks": ("callbacks/support/lightning_internals.py",),
    "atlas_lm": ("atlas_lm/training/lightning_internals.py", "atlas_lm/checkpoints/content.py"),
}
PRIVATE = re.compile(
    r"\b(?:trainer|loop|epoch_loop|call|callback|progress)\._(?!_)\w+|_batches_that_stepped|_should_accumulate"
    r"|_skip_next_val|(?<!self\.)_last_global_step_saved"
)


class Seen(lightning.Callback):
    """What the functions say in `on_train_batch_end`."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, bool, int, bool]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = trainer.global_step, internals.accumulates(trainer), internals.logging_step(trainer)
        self.rows.append((*row, internals.is_logging_step(trainer)))


def test_the_loop_counts_as_we_read_it(fit: Any) -> None:
    seen = Seen()
    fit(Line(), seen, accumulate_grad_batches=2, max_steps=3, log_every_n_steps=2)
    assert seen.rows == [
        (0, True, 0, False), (1, False, 0, False), (1, True, 1, True), (2, False, 1, True),
        (2, True, 2, False), (3, False, 2, False),
    ]  # fmt: skip


def test_loggers_are_given_those_steps(fit: Any) -> None:
    lines = Lines()
    fit(Line(), logger=lines, max_steps=6, log_every_n_steps=2)
    assert [step for step, row in lines.rows if "train/loss" in row] == [1, 3, 5]


def test_step_ends_come_after_validation_with_the_counters_of_the_step(fit: Any) -> None:
    events: list[Any] = []

    class Ends(lightning.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            for _ in range(2):  # asked for twice, called once
                internals.at_step_ends(trainer, lambda: events.append((trainer.global_step, counters(trainer))))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            events.append("validation")

    def counters(trainer: Any) -> tuple[int, int]:
        loop = trainer.fit_loop.epoch_loop
        return loop.batch_progress.total.ready - loop.batch_progress.total.completed, internals.logging_step(trainer)

    fit(Line(), Ends(), max_steps=4, val_check_interval=2, limit_val_batches=1)
    assert events == [(1, (1, 0)), "validation", (2, (1, 1)), (3, (1, 2)), "validation", (4, (1, 3))]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_a_saved_step_that_was_not_complete_counts(fit: Any, tmp_path: Path) -> None:
    """The rule by which a checkpoint's logging step is read is Lightning's own, at a resume."""
    saved: dict[str, int] = {}

    class Saves(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                total = trainer.fit_loop.epoch_loop.batch_progress.total
                stepped = internals.logging_step(trainer)
                saved["next"] = internals.logged_steps(stepped, total.completed, total.processed)

    fit(Line(), Saves(), max_steps=3)
    lines = Lines()
    fit(Line(), logger=lines, max_steps=5, ckpt_path=tmp_path / "x.ckpt")
    assert next(step for step, row in lines.rows if "train/loss" in row) == saved["next"] == 3


def test_an_error_can_take_the_place_of_another(fit: Any) -> None:
    class Replaces(lightning.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            internals.raise_after_teardown(trainer, ValueError("ours"), exception)

    class Breaks(Line):
        def training_step(self, batch: Any, index: int) -> Any:
            raise KeyError("theirs")

    with pytest.raises(ValueError, match="ours") as caught:
        fit(Breaks(), Replaces())
    assert isinstance(caught.value.__cause__, KeyError)


def test_checkpoint_callbacks_remember_their_last_save_under_this_name() -> None:
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint()
    checkpoint._last_global_step_saved = 7
    internals.forget_last_save(checkpoint)
    assert checkpoint._last_global_step_saved == 0
    assert hasattr(lightning.pytorch.callbacks.ModelCheckpoint(), "_last_global_step_saved")


def private_names(folder: Path, spared: tuple[str, ...]) -> list[str]:
    found = []
    for path in folder.rglob("*.py"):
        if str(path.relative_to(ROOT)) not in spared:
            lines = path.read_text().splitlines()
            found += [f"{path.name}:{n} {m[0]}" for n, line in enumerate(lines, 1) for m in PRIVATE.finditer(line)]
    return found


@pytest.mark.parametrize("side", WALLS)
def test_private_names_stand_in_one_file_of_each_side(side: str) -> None:
    assert private_names(ROOT / side, WALLS[side]) == []
    assert private_names(ROOT / side, ()) != [], "the pattern finds them where they are"
