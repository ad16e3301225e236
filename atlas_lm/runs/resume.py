"""Going on with a run where it ended: in its folder, from its newest intact checkpoint, behind its last record."""

import fcntl
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import OmegaConf

from atlas_lm.checkpoints.io import check_same_model, position, read_checkpoint, steps_recorded
from atlas_lm.config.schema import TrainConfig
from atlas_lm.runs.folder import (
    CONFIG,
    has_ended_well,
    newest_checkpoint,
    newest_intact,
    overrides_of,
    resolve_checkpoint,
    resolve_run,
    runs_in,
)

log = logging.getLogger(__name__)

AUTO = "auto"  # resume: the newest run of the experiment if it is not finished, else a new one
LOCK, REPORT = ".lock", "report.json"
SHARDED = "atlas_lm.training.strategies.FullySharded"  # the strategy of trainer=fsdp


def run_folder(resume: str | None, outputs: str, name: str, new: str) -> str:
    """Where a run writes: the folder of the run that it goes on with, else outputs/name/new.

    It goes on there if that run is of the same experiment, and if `resume` means its newest checkpoint. From an older
    one, or under another name, a run of its own begins, and the first one stays as it is.
    """
    experiment = Path(outputs) / name
    found = _run_of(resume, outputs, experiment) if resume else None
    same = found is not None and found.parent.resolve() == experiment.resolve()
    return str(found.resolve() if found is not None and same else experiment / new)


def _run_of(resume: str, outputs: str, experiment: Path) -> Path | None:
    """The run folder that `resume` goes on with; None where a new one begins, or where it is wrong (told later)."""
    if resume == AUTO:
        return unfinished_run(experiment)
    path = Path(resume)
    if path.is_file():
        run = path.resolve().parent.parent
        newest = newest_intact(run)[0] if (run / CONFIG).is_file() else None
        # several files may hold the same moment: last.ckpt, interrupted.ckpt, a snapshot
        return run if newest is not None and position(path) == position(newest) else None
    try:
        return resolve_run(path, outputs)
    except ValueError:
        return None


def unfinished_run(experiment: Path) -> Path | None:
    """The newest run of an experiment, if it has not ended well. Starts without a checkpoint do not count."""
    newest = next((run for run in runs_in(experiment) if newest_checkpoint(run) is not None), None)
    return None if newest is None or has_ended_well(newest) else newest


def sweep_folder(resume: str | None, outputs: str, name: str, new: str, overrides: Sequence[str]) -> str:
    """Where a run of a sweep writes, below `outputs`: with `auto` the folder of the newest run that was started with
    the same overrides, finished or not, else name/new. So a sweep that is started again does what is left of it."""
    experiment = Path(outputs) / name
    if resume == AUTO:
        wanted = started_with(overrides)
        for run in runs_in(experiment):
            before = overrides_of(run)
            same = before is not None and started_with(before) == wanted
            if same and (has_ended_well(run) or newest_checkpoint(run) is not None):
                return f"{name}/{run.name}"
    return f"{name}/{new}"


def started_with(overrides: Sequence[str]) -> list[str]:
    """The overrides of a run that say what is trained, in any order: `resume` only says from where."""
    return sorted(override for override in map(str, overrides) if not override.startswith("resume="))


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)


def checkpoint_to_resume(config: TrainConfig, module: LightningModule) -> Path | None:
    """What `resume` names, checked against the model; None: a new run begins.

    ValueError: there is none, all of them are damaged, or it is of another model.
    """
    if not config.resume:
        return None
    if config.resume == AUTO:
        path, skipped = newest_intact(Path(config.paths.run))
        for why in skipped:
            log.warning("warning: %s", why)
        if path is None:
            if skipped:
                raise ValueError(
                    f"resume=auto: no checkpoint of {config.paths.run!r} is intact: "
                    "start anew without resume=, or restore one"
                )
            rank_zero_info("resume=auto: there is no unfinished run of %s, a new one begins", config.name)
            return None
    else:
        path = resolve_checkpoint(config.resume, config.paths.outputs)
    check_same_model(path, module)
    header = read_checkpoint(path, lazily=True)
    if "loops" not in header or "optimizer_states" not in header:
        raise ValueError(f"{str(path)!r} holds weights alone and no state of a run: use init_from= to start from them")
    check_accumulation(path, header, config.trainer.get("accumulate_grad_batches") or 1)
    check_sharding(path, header, config.trainer.get("strategy"))
    return path


def check_sharding(path: Path, header: dict[str, Any], strategy: Any) -> None:
    """ValueError if one of the two runs shards its parameters and the other does not: Lightning numbers an optimizer's
    moments in another order there, and would give each parameter another one's."""
    shards = isinstance(strategy, dict) and strategy.get("_target_") == SHARDED
    saved = header.get("sharded", shards)  # older checkpoints do not say
    if saved != shards:
        was, now = ("trainer=fsdp" if one else "another strategy" for one in (saved, shards))
        raise ValueError(
            f"trainer.strategy: {str(path)!r} was written with {was} and cannot be resumed with {now}: "
            "set it back, or use init_from= to start a new run from its weights"
        )


def check_accumulation(path: Path, header: dict[str, Any], accumulated: int) -> None:
    """ValueError if the first optimizer step of the resumed run would take fewer than `accumulated` batches.

    Lightning counts windows from the beginning of an epoch, so a checkpoint has to lie between two of them.
    """
    progress = header["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    batches = progress["current"]["ready"]
    if batches % accumulated and not progress["is_last_batch"]:
        fits = [n for n in range(1, batches + 1) if batches % n == 0]
        raise ValueError(
            f"trainer.accumulate_grad_batches={accumulated} cannot be resumed from {str(path)!r}, which was written "
            f"after {batches} batches of an epoch, in the middle of {accumulated}: choose one of "
            f"{', '.join(map(str, fits[-8:]))}, or another checkpoint"
        )


def continue_records(trainer: Trainer, checkpoint: Path) -> int:
    """Have every logger that can go on exactly behind the checkpoint: nothing twice, nothing lost.

    Returns the number of the first logging step that is not recorded yet.
    """
    step = steps_recorded(read_checkpoint(checkpoint, lazily=True))
    for logger in trainer.loggers:
        go_on = getattr(logger, "go_on_from", None)
        if go_on is not None:
            go_on(step)
    rank_zero_info("resuming %s: the records go on at step %d", checkpoint, step)
    return step


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder for this process; the kernel lets it go, however the process ends.

    ValueError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{str(run)!r} is being written to by another process: wait until it ends, or stop it, then resume"
            ) from None
        yield


def keep_aside(path: Path, text: str) -> None:
    """Rename `path` to <stem>.<n><suffix> if it holds something other than `text`."""
    if not path.is_file() or path.read_text(encoding="utf-8") == text:
        return
    n = 1
    while (aside := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists():
        n += 1
    path.rename(aside)
    log.info("%s differs from that of the run so far, which is kept as %s", path.name, aside.name)


def withdraw_report(run: Path) -> None:
    """What a run was before it goes on is no verdict on it any more."""
    for name in (REPORT, "report.md"):
        (run / name).unlink(missing_ok=True)
