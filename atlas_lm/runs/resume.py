"""Going on with a run where it ended: in its folder, from its newest intact checkpoint, behind its last record."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from atlas_lm.checkpoints.content import steps_recorded
from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.checkpoints.listing import newest_intact
from atlas_lm.config.schema import TrainConfig
from atlas_lm.runs.init_from import weights_to_start_from
from atlas_lm.runs.resolve import AUTO, resolve_checkpoint
from atlas_lm.training.load import check_same_model, load_weights

log = logging.getLogger(__name__)

SHARDED = "atlas_lm.training.strategies.FullySharded"  # the strategy of trainer=fsdp


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


def starting_point(config: TrainConfig, module: LightningModule) -> Path | None:
    """Load what `init_from` names into the module; the checkpoint that `resume` names.

    ValueError if either does not fit the model.
    """
    outputs = config.paths.outputs
    checkpoint = checkpoint_to_resume(config, module)
    if checkpoint:
        if config.init_from:  # +experiment=stage2 resume=... has both
            rank_zero_info("resume=%s: init_from=%s is what that run began with", config.resume, config.init_from)
        return checkpoint
    if config.init_from:
        source = weights_to_start_from(config.init_from, module, outputs)
        load_weights(module, source)
        rank_zero_info("starting from the weights of %s", source)
    return None
