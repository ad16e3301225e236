"""Run folders: `outputs/<experiment>/<timestamp>/`, and `outputs/<experiment>/latest` for the newest finished one."""

import json
import logging
import os
import re
from pathlib import Path

from atlas_lm.config import nearest

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # its presence makes a folder a run folder
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
        unfinished = sorted(folder for folder in experiment.iterdir() if (folder / CONFIG).is_file())
        if unfinished:
            raise ValueError(f"{str(experiment)!r} has no finished run; give the path of one, e.g. {unfinished[-1]}")
        raise ValueError(f"{str(experiment)!r} is no run folder (no {CONFIG} in it): give one, or an experiment's name")
    known = sorted(f.name for f in Path(outputs).iterdir() if f.is_dir()) if Path(outputs).is_dir() else []
    has = f"{str(outputs)!r} has {', '.join(known)}" if known else f"{str(outputs)!r} has no runs yet: train one first"
    raise ValueError(f"no run {str(name_or_path)!r}{nearest(path.name, known)}; {has}")


def finished_runs(experiment: Path) -> list[Path]:
    """The runs of an experiment that ended well, the newest first."""
    found = []
    for folder in sorted(experiment.iterdir(), reverse=True) if experiment.is_dir() else []:
        report = folder / "report.json"
        if folder.is_symlink() or not report.is_file():
            continue
        try:
            ended = json.loads(report.read_bytes())
        except (OSError, ValueError, RecursionError):  # a broken report tells of no good end
            continue
        if isinstance(ended, dict) and ended.get("status") in FINISHED:
            found.append(folder)
    return found


def resolve_checkpoint(name_or_path: str | Path, outputs: str | Path = "outputs") -> Path:
    """A checkpoint file: the path itself, or the newest intact one of a run. ValueError: there is none, or damaged."""
    path = Path(name_or_path)
    if path.is_file():
        from atlas_lm.checkpoint import check_intact  # imports torch, which takes seconds

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
    """The checkpoint written last of those that can be used, and one line for each newer one that cannot."""
    from atlas_lm.checkpoint import why_unusable  # imports torch, which takes seconds

    skipped: list[str] = []
    for path in checkpoints_in(run / "checkpoints"):
        wrong = why_unusable(path.resolve())  # what is damaged is the file, not the link
        if wrong is None:
            return path, skipped
        skipped.append(wrong)
    return None, skipped


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run that was written last, intact or not; `last.ckpt` rather than the file it points to."""
    return next(iter(checkpoints_in(run / "checkpoints")), None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first, each once: under its link's name if it has one.

    Left out: what a rollback abandoned, and links to nowhere.
    """
    found: dict[Path, Path] = {}
    for path in sorted(folder.glob("*.ckpt"), key=Path.is_symlink):
        if path.is_file() and not re.search(r"\.abandoned\d*$", path.resolve().name):
            found[path.resolve()] = path
    return sorted(found.values(), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def mark_latest(run: Path, experiment: Path) -> None:
    """Let `experiment`/latest point at `run`. Atomic: a reader sees the old run or the new one."""
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
