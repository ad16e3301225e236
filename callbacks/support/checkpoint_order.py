"""Which checkpoint is later: the one of which training had come further.

Time stamps do not show it: they do not survive a copy, and clocks are set back.
"""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from callbacks.support.lightning_internals import STEPPED, logged_steps, logging_step

Position = tuple[int, int]  # logging steps, which never go back, and optimizer steps, which a rollback sets back


def position_now(trainer: Trainer) -> Position:
    """The position that a checkpoint written at this moment has."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return _position(logging_step(trainer), total.completed, total.processed, trainer.global_step)


def position(path: Path) -> Position | None:
    """The position in a checkpoint of Lightning's; None where the file says none. Runs no code of the file's."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        loop = content["loops"]["fit_loop"]
        total = loop["epoch_loop.batch_progress"]["total"]
        done = loop["epoch_loop.state_dict"][STEPPED]
        return _position(done, total["completed"], total["processed"], content["global_step"])
    except Exception:  # what a file of somebody else's makes torch's reader raise has no end
        return None


def by_step(folder: Path, prefix: str) -> list[Path]:
    """The files `prefix`-<step>.ckpt of a folder, the lowest step first; no link, and nothing that is named otherwise.

    A rollback renames those of the timeline that it leaves, so a higher step is a later one.
    """
    found = []
    for path in folder.glob(f"{prefix}-*.ckpt"):
        step = re.fullmatch(rf"{prefix}-(\d+)\.ckpt", path.name)
        if step and not path.is_symlink():
            found.append((int(step[1]), path))
    return [path for _, path in sorted(found)]


def _position(stepped: int, completed: int, processed: int, step: int) -> Position:
    return logged_steps(stepped, completed, processed), step
