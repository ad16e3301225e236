"""Resuming a run where it ended: in its folder, from its newest intact checkpoint, after its last record."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.content import steps_recorded
from atlas_lm.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from atlas_lm.checkpoints.listing import Usable, newest_examined
from atlas_lm.config.schema import TrainConfig
from atlas_lm.runs.folder import job_of
from atlas_lm.runs.init_from import weights_to_start_from
from atlas_lm.runs.resolve import AUTO, examined_checkpoint, unfinished_run
from atlas_lm.training.load import check_same_model, load_weights

log = logging.getLogger(__name__)

SHARDED = "atlas_lm.training.strategies.FullySharded"  # the strategy of trainer=fsdp


class ResumePoint(NamedTuple):
    """Where a run continues: resolved once, its bytes verified once, its header read once, and handed down."""

    run: Path
    checkpoint: Path
    header: dict[str, Any]  # the checkpoint's content, tensors left on disk
    next_step: int  # the first logging step that is not recorded yet


HANDED_DOWN = "ATLAS_LM_RESUME_FROM"  # rank zero's checkpoint, for the ranks that Lightning starts from it


def resume_point(config: TrainConfig) -> ResumePoint | None:
    """What `resume` names; None: a new run begins. ValueError: there is none, damaged, or holds weights alone.

    Ranks that Lightning starts take rank zero's, which has verified it. Those of a launcher find it themselves.
    """
    found = _examined(config)
    if rank() == 0:
        os.environ.pop(HANDED_DOWN, None)
    if found is None:
        return None
    path, header = found
    if "loops" not in header or "optimizer_states" not in header:
        raise ValueError(f"{str(path)!r} holds weights alone and no state of a run: use init_from= to start from them")
    if rank() == 0:
        os.environ[HANDED_DOWN] = str(path.absolute())
    return ResumePoint(Path(config.paths.run), path, header, steps_recorded(header))


def _examined(config: TrainConfig) -> Usable | None:
    if not config.resume:
        return None
    if rank() != 0 and HANDED_DOWN in os.environ:
        path = Path(os.environ[HANDED_DOWN])
        return Usable(path, read_checkpoint(path, lazily=True))
    if config.resume != AUTO:
        return examined_checkpoint(config.resume, config.paths.outputs)
    found, skipped = newest_examined(Path(config.paths.run))
    for why in skipped:
        log.warning("warning: %s", why)
    if found is None:
        if skipped:
            raise ValueError(
                f"resume=auto: no checkpoint of {config.paths.run!r} is intact: "
                "start again without resume=, or restore one"
            )
        rank_zero_info("resume=auto: %s", nothing_to_resume(Path(config.paths.outputs), config.name))
    return found


def nothing_to_resume(outputs: Path, name: str) -> str:
    """That a new run of `name` begins, and which others wait: whoever forgot `+experiment=` meant one of these."""
    folders = [path for path in outputs.iterdir() if path.is_dir() and path.name != name] if outputs.is_dir() else []
    waiting = sorted(path.name for path in folders if unfinished_run(path) is not None)
    hint = (
        f"; unfinished are {', '.join(waiting)}: name=<one of them>, with its settings, resumes it" if waiting else ""
    )
    left = unfinished_run(outputs / name)
    if left is None or job_of(left) is None:
        return f"no run of {name!r} waits to be continued (of several the newest counts), a new one begins{hint}"
    job = job_of(left)
    first = "cancel the job, then " if str(job).startswith("slurm-") else ""  # SLURM is asked; other jobs are not
    return f"a new run begins; {left} is unfinished, of job {job}, which may come back: {first}resume={left} takes it"


def rank() -> int:
    """This process's rank, as Lightning knows it before there is a process group."""
    return getattr(rank_zero_only, "rank", 0)


def check_resumable(point: ResumePoint, config: TrainConfig, module: LightningModule) -> None:
    """ValueError: the checkpoint is of another model, or this Trainer cannot continue from it."""
    check_same_model(point.checkpoint, point.header, module)
    check_accumulation(point.checkpoint, point.header, config.trainer.get("accumulate_grad_batches") or 1)
    check_sharding(point.checkpoint, point.header, config.trainer.get("strategy"))


def check_sharding(path: Path, header: dict[str, Any], strategy: Any) -> None:
    """ValueError: one file that a sharding strategy gathered, for a strategy that does not shard. Lightning numbers an
    optimizer's moments in another order there, and would give each parameter another one's."""
    shards = isinstance(strategy, dict) and strategy.get("_target_") == SHARDED
    gathered = header.get("sharded", shards) and manifest.SHARDS not in header  # older checkpoints do not say
    if gathered and not shards:
        raise ValueError(
            f"trainer.strategy: {str(path)!r} was gathered by trainer=fsdp with save_distributed_checkpoint=false and "
            "cannot be resumed with another strategy: set it back, or start a new run from its weights with init_from="
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


def rewind_loggers(trainer: Trainer, point: ResumePoint | None) -> None:
    """Have every logger that can do so continue exactly after the checkpoint: nothing twice, nothing lost. None: there
    is none yet, and the run begins again in its folder.

    What this process has verified is not verified again when Lightning reads it.
    """
    plugin = trainer.strategy.checkpoint_io
    if isinstance(plugin, AtomicCheckpointIO) and point is not None:
        plugin.verified = point.checkpoint
    step = 0 if point is None else point.next_step
    for logger in trainer.loggers:
        rewind = getattr(logger, "resume_from_step", None)
        if rewind is not None:
            rewind(step)
    if point is None:
        rank_zero_info("there is no checkpoint yet: the run begins again in its folder, and its records with it")
    else:
        rank_zero_info("resuming %s: the records continue at step %d", point.checkpoint, step)


def load_starting_weights(config: TrainConfig, module: LightningModule) -> ResumePoint | None:
    """Load what `init_from` names into the module, or return where `resume` continues.

    ValueError if either does not fit the model.
    """
    point = resume_point(config)
    if point is not None:
        check_resumable(point, config, module)
        if config.init_from:  # +experiment=stage2 resume=... has both
            rank_zero_info("resume=%s: init_from=%s is what that run began with", config.resume, config.init_from)
    elif config.init_from:
        source = weights_to_start_from(config.init_from, module, config.paths.outputs)
        load_weights(module, source)
        rank_zero_info("starting from the weights of %s", source)
    return point
