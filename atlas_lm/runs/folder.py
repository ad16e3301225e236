"""Run folders: `outputs/<experiment>/<timestamp>/`, and `outputs/<experiment>/latest` for the newest finished one.

The time stamp is a name for people. Runs of an experiment are ordered by the number that each got when it began: clocks
differ between machines, time zones and containers, and go back.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_lm.config.parsing import CONFIG
from atlas_lm.files import link_atomically, next_free, write_atomically

log = logging.getLogger(__name__)

# {"number": which run of its experiment it is, "overrides": what it was started with, "job": of the scheduler, "asked":
# what that job was started with, where it is another one}
IDENTITY = "run.json"
LATEST = "latest"
FINISHED = ("finished", "stopped early")  # what a report calls a run that ended well


def runs_in(experiment: Path) -> list[Path]:
    """The run folders of an experiment, the newest first.

    A copy of a run has its number: of two with the same one the newer is that which was trained further. Runs of older
    versions have none; they are the oldest, ordered by name.
    """
    folders = [f for f in experiment.iterdir() if not f.is_symlink()] if experiment.is_dir() else []
    folders = [f for f in folders if f.name.partition(".")[0] != LATEST]  # copying without links makes a folder of it
    numbers = {folder: number_of(folder) for folder in folders if (folder / CONFIG).is_file()}
    shared = {number for number, count in Counter(numbers.values()).items() if number and count > 1}

    def key(run: Path) -> tuple[Any, ...]:
        return numbers[run], _trained(run) if numbers[run] in shared else (), run.name

    return sorted(numbers, key=key, reverse=True)


def _trained(run: Path) -> tuple[float, int]:
    from atlas_lm.checkpoints.listing import newest_checkpoint, position  # imports torch, which takes seconds

    newest = newest_checkpoint(run)
    return (-1, 0) if newest is None else position(newest)


def number_of(run: Path) -> int:
    """Which run of its experiment it is, from 1 on; 0 where that is not known."""
    number = _read_json(run / IDENTITY).get("number")
    return number if isinstance(number, int) else 0


def overrides_of(run: Path) -> list[str] | None:
    """The command line's overrides that a run was started with; None where they are not known."""
    found = _read_json(run / IDENTITY).get("overrides")
    return found if isinstance(found, list) else None


def job_of(run: Path) -> str | None:
    """The scheduler's job that trains it, or did last; None where there was none."""
    found = _read_json(run / IDENTITY).get("job")
    return found if isinstance(found, str) else None


def asked_of(run: Path) -> list[str] | None:
    """The overrides of the process that trains it, or did last; None where they are not known."""
    found = _read_json(run / IDENTITY).get("asked")
    return found if isinstance(found, list) else overrides_of(run)


def bind(run: Path, job: str | None, overrides: Sequence[str]) -> None:
    """The run is trained by this job from now on, which was started with these overrides."""
    known = _read_json(run / IDENTITY)
    changed = {**known, "job": job, "asked": list(overrides)}
    if known and known != changed:
        write_atomically(run / IDENTITY, json.dumps(changed, indent=2) + "\n")


def write_identity(run: Path, overrides: Sequence[str], job: str | None = None) -> None:
    """Give a run that begins its number, one above those of all runs beside it, however many begin at once."""
    with _alone_in(run.parent):
        number = 1 + max((number_of(other) for other in run.parent.iterdir()), default=0)
        identity = {"number": number, "overrides": list(overrides), "job": job}
        write_atomically(run / IDENTITY, json.dumps(identity, indent=2) + "\n")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that ask for it here too, where its filesystem has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def has_ended_well(run: Path) -> bool:
    """Whether its report says so. One that is still running or was killed has none."""
    return _read_json(run / "report.json").get("status") in FINISHED


def finished_runs(experiment: Path) -> list[Path]:
    """The runs of an experiment that ended well, the newest first."""
    return [run for run in runs_in(experiment) if has_ended_well(run)]


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no file, or no whole one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def mark_latest(run: Path, experiment: Path) -> None:
    """Let `experiment`/latest point at `run`. Atomic: a reader sees the old run or the new one.

    A folder of that name, which copying without links makes, is kept as latest.<n>.
    """
    latest = experiment / LATEST
    if latest.is_dir() and not latest.is_symlink():
        kept = next_free(latest)
        log.warning("%s is a folder and no link, as a copy without links has it: kept as %s", latest, kept.name)
        latest.rename(kept)
    link_atomically(latest, run)
