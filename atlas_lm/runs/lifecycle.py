"""A run folder from when a run begins in it, or is resumed, to when it ends."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from atlas_lm.checkpoints.listing import newest_checkpoint
from atlas_lm.config.parsing import CONFIG
from atlas_lm.files import ROOT, next_free, write_atomically
from atlas_lm.runs.environment import environment
from atlas_lm.runs.folder import FINISHED, bind, finished_runs, has_ended_well, job_of, mark_latest, write_identity
from atlas_lm.runs.job import current_job, still_known
from atlas_lm.runs.lock import locked
from atlas_lm.runs.report import Report
from atlas_lm.runs.resolve import AUTO, runs_of_job
from atlas_lm.runs.stats import RunStats

log = logging.getLogger(__name__)


REPORT = "report.json"


def task_overrides() -> list[str]:
    """What the command line says of this run."""
    return [str(word) for word in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def resume_own_run(cfg: DictConfig) -> None:
    """In a scheduler's job that is started again: `resume` becomes auto, the job's own run.

    Also where `resume` named what the job began from: it would begin there again each time.

    ValueError: it has two runs, or what is to be resumed is a job's that SLURM will start again."""
    job, run = current_job(), Path(cfg.paths.run)
    mine = [] if job is None else runs_of_job(Path(cfg.paths.outputs) / cfg.name, job, task_overrides())
    if len(mine) > 1:
        raise ValueError(
            f"job {job} has {len(mine)} runs of these settings, {' and '.join(map(str, mine))}: move one away and "
            "submit again with resume=<the other>"
        )
    owner = job_of(run)
    if owner not in (None, job) and not has_ended_well(run) and still_known(str(owner)):
        raise ValueError(
            f"{str(run)!r} is the run of job {owner}, which SLURM still has: it runs, or will run again; scancel "
            f"{str(owner).removeprefix('slurm-').replace('-', '_')} to continue it here, or give another name="
        )
    if cfg.resume in (None, AUTO):
        if (run / CONFIG).is_file() and (cfg.resume == AUTO or (job is not None and owner == job)):
            cfg.resume = AUTO
    elif mine and newest_checkpoint(run) is not None:
        cfg.resume = AUTO


@contextmanager
def open_run_folder(cfg: DictConfig) -> Iterator[bool]:
    """Hold the run's folder; True if a run is resumed there.

    Until it trains nothing of that run changes, see `write_resumed_metadata`.

    ValueError if another run lies there, or another process writes there.
    """
    run = Path(cfg.paths.run)
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield bool(cfg.resume)
        return
    with locked(run):
        resumes = (run / CONFIG).exists()
        if resumes and not cfg.resume:
            raise ValueError(f"{str(run)!r} already holds a run: start again a second later, or give hydra.run.dir")
        if not resumes:
            write_atomically(run / "environment.json", json.dumps(environment(ROOT), indent=2) + "\n")
            write_identity(run, task_overrides(), current_job())
            write_atomically(run / CONFIG, configuration(cfg))
        yield resumes


def stats_of(cfg: DictConfig, held_out_text: str, resumes: bool, checkpoint: Path | None) -> RunStats:
    """The statistics of a run that is about to train; when it does, `write_resumed_metadata`, if it is resumed."""
    measured = f"{held_out_text}, {cfg.data}, {cfg.trainer}, {cfg.precision}"
    source = None if checkpoint is None else str(checkpoint.resolve())
    return RunStats(measured, partial(write_resumed_metadata, cfg) if resumes else None, source)


def configuration(cfg: DictConfig) -> str:
    """What a run folder holds of its configuration. `resume` is left out: it says how this process came to the run."""
    return OmegaConf.to_yaml(OmegaConf.merge(cfg, {"resume": None}), resolve=True)


@rank_zero_only
def write_resumed_metadata(cfg: DictConfig) -> None:
    """Training continues: its configuration and environment are the run's now, and its old report is withdrawn."""
    run = Path(cfg.paths.run)
    bind(run, current_job(), task_overrides())
    now = environment(ROOT)
    try:
        then = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        then = {}
    if {**then, "command": None} != {**now, "command": None}:
        text = json.dumps(now, indent=2) + "\n"
        archive_if_changed(run / "environment.json", text)
        write_atomically(run / "environment.json", text)
    text = configuration(cfg)
    archive_if_changed(run / CONFIG, text)
    write_atomically(run / CONFIG, text)
    delete_stale_report(run)


def archive_if_changed(path: Path, text: str) -> None:
    """Rename `path` to <stem>.<n><suffix> if it holds something other than `text`."""
    if not path.is_file():
        return
    before = path.read_text(encoding="utf-8")
    if before == text:
        return
    aside = next_free(path)
    path.rename(aside)
    log.info("%s changes in %s; as it was so far it is kept as %s", path.name, changed_keys(before, text), aside.name)


def changed_keys(before: str, now: str, shown: int = 6) -> str:
    """Names of the settings in which two YAML or JSON texts differ, as train.py takes them."""
    old, new = (settings_in(text) for text in (before, now))
    absent = object()
    names = sorted(name for name in old.keys() | new.keys() if old.get(name, absent) != new.get(name, absent))
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def settings_in(text: str) -> dict[str, Any]:
    """Dotted name → value. Of a text that is broken, or holds no settings: the text itself, under a name for all."""
    try:
        found = OmegaConf.create(text)
    except (ValueError, OSError, YAMLError):
        return {"all": text}
    flat: dict[str, Any] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(f"{name}.{key}" if name else str(key), inner)
        else:
            flat[name] = value

    visit("", OmegaConf.to_container(found))
    return flat


def delete_stale_report(run: Path) -> None:
    """What a run was before it continues is no verdict on it any more."""
    for name in (REPORT, "report.md"):
        (run / name).unlink(missing_ok=True)


def is_sweep() -> bool:
    """Whether Hydra runs this process's job as one of several (-m)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def result_so_far(cfg: DictConfig) -> Report | None:
    """The report of a run that a sweep which is resumed, or a job that is repeated, has finished before; None: there is
    something to train."""
    if cfg.resume != AUTO or not (is_sweep() or current_job() is not None):
        return None
    run = Path(cfg.paths.run)
    if not has_ended_well(run):
        return None
    again = "without resume=auto" if is_sweep() else "in another job, or under another name=,"
    log.info("resume=auto: %s is finished and stays as it is; %s it is trained again", run, again)
    return json.loads((run / "report.json").read_bytes())


@rank_zero_only
def close_run_folder(cfg: DictConfig, report: dict[str, Any]) -> None:
    """The newest finished run of the experiment becomes its `latest`."""
    run, experiment = Path(cfg.paths.run), Path(cfg.paths.outputs) / cfg.name
    if report["status"] in FINISHED:
        inside = run.resolve().parent == experiment.resolve()  # hydra.run.dir may have put it elsewhere
        mark_latest(finished_runs(experiment)[0] if inside else run, experiment)
