"""Run folders: `outputs/<experiment>/<timestamp>/`, and `outputs/<experiment>/latest` for the newest finished one.

The time stamp is a name for people. Runs of an experiment are ordered by the number that each got when it began: clocks
differ between machines, time zones and containers, and go back.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_lm.config.schema import nearest

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # its presence makes a folder a run folder
IDENTITY = "run.json"  # {"number": which run of its experiment it is, "overrides": what it was started with}
LATEST = "latest"
FINISHED = ("finished", "stopped early")  # what a report calls a run that ended well


def resolve_run(name_or_path: str | Path, outputs: str | Path = "outputs") -> Path:
    """The run folder that a path, or an experiment's name, stands for: the name means its newest finished run.

    ValueError: neither, an experiment without a finished run, or a folder that is no run's.
    """
    path = Path(name_or_path)
    if (path / CONFIG).is_file():
        return path.resolve()
    is_name = path.name == str(name_or_path)
    experiment = Path(outputs) / path if is_name and not path.is_dir() else path
    if (experiment / LATEST / CONFIG).is_file():
        return (experiment / LATEST).resolve()
    if experiment.is_dir():
        unfinished = runs_in(experiment)
        if unfinished:
            raise ValueError(f"{str(experiment)!r} has no finished run; give the path of one, e.g. {unfinished[0]}")
        raise ValueError(f"{str(experiment)!r} is no run folder (no {CONFIG} in it): give one, or an experiment's name")
    known = sorted(f.name for f in Path(outputs).iterdir() if f.is_dir()) if Path(outputs).is_dir() else []
    has = f"{str(outputs)!r} has {', '.join(known)}" if known else f"{str(outputs)!r} has no runs yet: train one first"
    raise ValueError(f"no run {str(name_or_path)!r}{nearest(path.name, known)}; {has}")


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
    from atlas_lm.checkpoints.io import position  # imports torch, which takes seconds

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


def write_identity(run: Path, overrides: Sequence[str]) -> None:
    """Give a run that begins its number, one above those of all runs beside it, however many begin at once."""
    with _alone_in(run.parent):
        number = 1 + max((number_of(other) for other in run.parent.iterdir()), default=0)
        write_atomically(run / IDENTITY, json.dumps({"number": number, "overrides": list(overrides)}, indent=2) + "\n")


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


def resolve_checkpoint(name_or_path: str | Path, outputs: str | Path = "outputs") -> Path:
    """A checkpoint file: the path itself, or the newest intact one of a run. ValueError: there is none, or damaged."""
    path = Path(name_or_path)
    if path.is_file():
        from atlas_lm.checkpoints.io import check_intact  # imports torch, which takes seconds

        check_intact(path)
        return path.absolute()
    if path.suffix == ".ckpt":
        beside = [p.name for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise ValueError(f"no checkpoint {str(path)!r}{nearest(path.name, beside)}: correct the path")
    return intact_checkpoint(resolve_run(path, outputs))


def intact_checkpoint(run: Path) -> Path:
    """The newest intact checkpoint of a run; the log names newer ones that are damaged. ValueError if there is none."""
    found, skipped = newest_intact(run)
    if found is None:
        if skipped:
            raise ValueError(f"run {str(run)!r} has no intact checkpoint: {'; '.join(skipped)}: choose another run")
        raise ValueError(f"run {str(run)!r} has no checkpoint: it ended before its first one, choose another run")
    for line in skipped:
        log.warning("%s: taking %s instead", line, found)
    return found


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint of those that can be used, and one line for each later one that cannot."""
    from atlas_lm.checkpoints.io import why_unusable  # imports torch, which takes seconds

    skipped: list[str] = []
    for path in checkpoints_in(run / "checkpoints"):
        wrong = why_unusable(path.resolve())  # what is damaged is the file, not the link
        if wrong is None:
            return path, skipped
        skipped.append(wrong)
    return None, skipped


def newest_checkpoint(run: Path) -> Path | None:
    """The latest checkpoint of a run, intact or not; `last.ckpt` rather than the file it points to."""
    return next(iter(checkpoints_in(run / "checkpoints")), None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the latest first, each once: under its link's name if it has one.

    Ordered by how far training had come, whatever clocks and names say: time stamps do not survive a copy, clocks are
    set back. Left out: what a rollback abandoned, and links to nowhere.
    """
    from atlas_lm.checkpoints.io import position  # imports torch, which takes seconds

    found: dict[Path, Path] = {}
    for path in sorted(folder.glob("*.ckpt"), key=Path.is_symlink):
        if path.is_file() and not re.search(r"\.abandoned\d*$", path.resolve().name):
            found[path.resolve()] = path
    by_name = sorted(found.values(), key=lambda path: path.name)  # those of one position hold the same
    return sorted(by_name, key=position, reverse=True)


def mark_latest(run: Path, experiment: Path) -> None:
    """Let `experiment`/latest point at `run`. Atomic: a reader sees the old run or the new one.

    A folder of that name, which copying without links makes, is kept as latest.<n>.
    """
    latest = experiment / LATEST
    if latest.is_dir() and not latest.is_symlink():
        numbers = itertools.count(1)
        kept = next(path for n in numbers if not (path := experiment / f"{LATEST}.{n}").exists())
        log.warning("%s is a folder and no link, as a copy without links has it: kept as %s", latest, kept.name)
        latest.rename(kept)
    temporary = experiment / f".{LATEST}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(run.resolve(), experiment.resolve()))
    os.replace(temporary, experiment / LATEST)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, never meets half of it."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
