"""From what the user named to run folders and checkpoints; where a run, or a run of a sweep, writes."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from atlas_lm.checkpoints.io import read_header
from atlas_lm.checkpoints.listing import (
    Usable,
    checkpoints_in,
    intact_checkpoint,
    newest_checkpoint,
    position,
    why_unusable,
)
from atlas_lm.config.names import nearest
from atlas_lm.config.parsing import CONFIG
from atlas_lm.runs.folder import LATEST, asked_of, has_ended_well, job_of, overrides_of, runs_in
from atlas_lm.runs.job import current_job, folder_of, is_submitted_alone, still_known

# resume: the newest run of the experiment if it is not finished, else a new one; in a scheduler's job the job's own run
AUTO = "auto"


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


def run_folder(resume: str | None, outputs: str, name: str, new: str, overrides: Sequence[str] = ()) -> str:
    """Where a run writes: the folder of the run that it resumes, else outputs/name/new.

    In a job of a scheduler: the folder of the job's own run, which all its ranks and every repetition of the job find
    alike, whatever `resume` named when it began. With `auto` a job that has none yet takes the newest unfinished run,
    if that is not of a job that may come back.

    It continues there if that run is of the same experiment, and if `resume` means its newest checkpoint. From an older
    one, or under another name, a run of its own begins, and the first one stays as it is.
    """
    experiment, job = Path(outputs) / name, current_job()
    if job is not None:
        mine = runs_of_job(experiment, job, overrides)
        if mine:
            return str(mine[0].resolve())
        new = folder_of(job, asked(overrides))
    found = _run_of(resume, outputs, experiment) if resume else None
    same = found is not None and found.parent.resolve() == experiment.resolve()
    if found is None or not same or (resume == AUTO and job is not None and not is_free(found)):
        return str(experiment / new)
    return str(found.resolve())


def runs_of_job(experiment: Path, job: str, overrides: Sequence[str]) -> list[Path]:
    """Those that this job trains with these overrides: one, unless somebody has copied it."""
    wanted = asked(overrides)
    return [run for run in runs_in(experiment) if job_of(run) == job and asked(asked_of(run) or []) == wanted]


def is_free(run: Path) -> bool:
    """Whether no job will come back for it, as far as can be known."""
    job = job_of(run)
    return job is None or still_known(job) is False


def unfinished_run(experiment: Path) -> Path | None:
    """The newest run of an experiment, if it has not ended well. Starts without a checkpoint do not count."""
    newest = next((run for run in runs_in(experiment) if newest_checkpoint(run) is not None), None)
    return None if newest is None or has_ended_well(newest) else newest


def sweep_folder(resume: str | None, outputs: str, name: str, new: str, overrides: Sequence[str]) -> str:
    """Where a run of a sweep writes, below `outputs`: with `auto` the folder of the newest run that was started with
    the same overrides, finished or not, else name/new. So a sweep that is started again does what is left of it; in a
    scheduler's job that is started again, what is left of its own.

    A launcher submits a single run too as a sweep, of one job: there `resume` means what it means in `run_folder`."""
    experiment, job = Path(outputs) / name, current_job()
    if job is not None:
        new = folder_of(job, asked(overrides))  # the same on all ranks
        if is_submitted_alone():
            return f"{name}/{Path(run_folder(resume, outputs, name, new, overrides)).name}"
        mine = runs_of_job(experiment, job, overrides)
        if mine:
            return f"{name}/{mine[0].name}"
    if resume == AUTO:
        wanted = started_with(overrides)
        for run in runs_in(experiment):
            before = overrides_of(run)
            if before is None or started_with(before) != wanted:
                continue
            begun = newest_checkpoint(run) is not None and (job is None or is_free(run))
            if begun or has_ended_well(run):
                return f"{name}/{run.name}"
    return f"{name}/{new}"


def resolve_checkpoint(name_or_path: str | Path, outputs: str | Path = "outputs") -> Path:
    """A checkpoint file: the path itself, or the newest intact one of a run. ValueError: there is none, or damaged."""
    return examined_checkpoint(name_or_path, outputs).path


def examined_checkpoint(name_or_path: str | Path, outputs: str | Path = "outputs") -> Usable:
    """As `resolve_checkpoint`, with the header; its bytes are verified once."""
    path = Path(name_or_path)
    if path.is_file():
        return read_header(path.absolute())
    if path.suffix == ".ckpt":
        beside = [p.name for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise ValueError(f"no checkpoint {str(path)!r}{nearest(path.name, beside)}: correct the path")
    return intact_checkpoint(resolve_run(path, outputs))


def _run_of(resume: str, outputs: str, experiment: Path) -> Path | None:
    """The run folder in which `resume` continues; None where a new one begins, or where it is wrong: reported later."""
    if resume == AUTO:
        return unfinished_run(experiment)
    path = Path(resume)
    if path.is_file():
        run = path.resolve().parent.parent
        if not (run / CONFIG).is_file():
            return None
        here, others = position(path), {file: position(file) for file in checkpoints_in(run / "checkpoints")}
        # several files may hold one moment: last.ckpt, interrupted.ckpt, a snapshot; damaged later ones do not count
        later = [file for file, found in others.items() if found > here]
        newest = here in others.values() and all(why_unusable(file) is not None for file in later)
        return run if newest else None
    try:
        return resolve_run(path, outputs)
    except ValueError:
        return None


def started_with(overrides: Sequence[str]) -> list[str]:
    """The overrides of a run that say what is trained, in any order: `resume` only says from where."""
    return sorted(override for override in map(str, overrides) if not override.startswith("resume="))


def asked(overrides: Sequence[str]) -> list[str]:
    """The overrides of a job, in any order: what it was given to resume too, but for `auto`, which is its own run."""
    return sorted(word for word in map(str, overrides) if word not in (f"resume={AUTO}", "resume=null"))


def run_id(run: str) -> str:
    """A run's name where runs of all experiments lie together."""
    return f"{Path(run).parent.name}-{Path(run).name}"


OmegaConf.register_new_resolver("run_id", run_id, replace=True)
OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)
