"""Return to an earlier state when the perplexity of held-out text jumps, or is not finite.

Watches:  the perplexity of a fixed held-out batch every `every_n_steps`, against its moving average; the training
          loss of every step for NaN and infinity, which make it evaluate that batch at once. `watch: training_loss`
          takes the mean training loss in between instead.
Acts:     returns to the second most recent of the last `keep_last` snapshots (model, optimizer, schedulers, scaler,
          callbacks, step counter), on all ranks together; the data moves on. More than `max_rollbacks` stop the run.
          A resumed run continues with the snapshots that its checkpoint names, from their files, and judges when the
          run before would have: where none is there, a checkpoint that was written in a spike is refused.
          `mode: observe` only records. Other callbacks may call `request_rollback`; while one has `blocks_snapshot`
          true, no snapshot is taken.
Logs:     spike_rollback/ppl, spike_rollback/ema, spike_rollback/ppl_delta, spike_rollback/threshold,
          spike_rollback/count, spike_rollback/rollbacks, spike_rollback/timeline.
Requires: HasHeldOutLoss and a validation loader (neither where it watches the training loss). Listed after the
          checkpoint callbacks: it runs last of all.
Source:   C2, C3. A failsafe, not the first defence.
"""

import hashlib
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils._pytree import tree_leaves

from callbacks.support.checkpoint_order import Position, by_step, position, position_now
from callbacks.support.collectives import any_rank, mean_over_ranks
from callbacks.support.lightning_internals import accumulates, is_logging_step, logging_step
from callbacks.support.probing import begins, held_out_batch, record, record_start, undisturbed
from callbacks.support.ranges import above, at_least, check, one_of, share
from callbacks.support.rollback_request import blocks_snapshot
from callbacks.support.snapshots import Snapshot, constants, restore, restore_file, take
from callbacks.support.step_end import after_writing, flush_records, open_step_ends, wait_for_files
from callbacks.support.step_loss import begin_step_losses, note_loss, step_losses
from callbacks.support.step_vote import enter, loss_not_finite, vote

log = logging.getLogger(__name__)

ABANDONED = ".abandoned"  # ending of checkpoints that a rollback abandoned


@runtime_checkable
class HasHeldOutLoss(Protocol):
    """All that this safeguard knows of the module."""

    def held_out_loss(self, batch: Any) -> Tensor:
        """Mean loss of a validation batch, nats per target; changes nothing."""
        ...


class TrainingUnstable(FloatingPointError):
    """More spikes than rollbacks are allowed."""


class StoredSnapshot(NamedTuple):
    """A snapshot in memory, its file, and the moving average at that moment."""

    snapshot: Snapshot | None  # None: the file alone, of a process before this one
    path: Path | None  # None: of the state that a sharded run starts from
    position: Position  # of the file; until the step is complete it is not there yet
    ema: float | None  # None with the file alone: it is in there


class SpikeRollback(Checkpoint):
    """Keeps snapshots of healthy moments and goes back to one when the run is no longer healthy.

    `threshold`: relative rise of the perplexity above its moving average that is a spike. `smoothing`: weight of the
    newest value in that average. `rows`: rows (samples, sequences) of the held-out batch, per rank, from as many
    validation batches as it takes; None: the first validation batch. The fewer, the more the perplexity of a healthy
    run moves about. `cool_down_steps`: training steps after a rollback in which only what is not finite is a spike.

    A `Checkpoint` by type: Lightning runs these after all other callbacks. ValueError: a value out of its range.
    """

    survives_rollback = True  # its counters say what has happened, and that stays so

    def __init__(
        self,
        folder: str,
        threshold: float = 0.05,
        every_n_steps: int = 100,
        keep_last: int = 5,
        max_rollbacks: int = 3,
        cool_down_steps: int = 0,
        smoothing: float = 0.8,
        rows: int | None = None,
        watch: str = "held_out",
        mode: str = "act",
    ) -> None:
        check(
            "spike_rollback", every_n_steps=(every_n_steps, at_least(1)), keep_last=(keep_last, at_least(2)),
            max_rollbacks=(max_rollbacks, at_least(0)), cool_down_steps=(cool_down_steps, at_least(0)),
            rows=(1 if rows is None else rows, at_least(1)), threshold=(threshold, above(0, "0.05 means 5 %")),
            smoothing=(smoothing, share()), watch=(watch, one_of("held_out", "training_loss")),
            mode=(mode, one_of("act", "observe")),
        )  # fmt: skip
        self.folder = Path(folder)
        self.threshold, self.every_n_steps, self.keep_last = threshold, every_n_steps, keep_last
        self.max_rollbacks, self.cool_down_steps = max_rollbacks, cool_down_steps
        self.smoothing, self.rows, self.watch, self.mode = smoothing, rows, watch, mode
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.ema: float | None = None
        self.ema_of = ""  # what it is the average of
        self.rollbacks = 0
        self.spikes: list[int] = []  # optimizer steps at which one was seen
        self.cooldown_until = 0  # logging step
        self.snapshots: list[StoredSnapshot] = []
        self._ring: list[tuple[str, int, int]] | None = None  # those of the run that is resumed: name, position
        self._constants: dict[str, Tensor] = {}
        self._requested: str | None = None
        self._unwritten = False  # the newest snapshot has no file yet, or an old one
        self._batch: Any = None
        self._losses: list[Tensor] = []  # of the steps since the last check

    # The judgement

    def delta(self, perplexity: float) -> float:
        """Relative rise above the moving average; 0 before there is one; infinite where it is not finite."""
        if not math.isfinite(perplexity):
            return math.inf
        if self.ema is None or perplexity == self.ema:
            return 0.0
        return (perplexity - self.ema) / self.ema if self.ema else math.inf  # a loss below −745 is a perplexity of 0

    def judge(self, delta: float, quiet: bool = False) -> bool:
        """Whether a rise is a spike; `quiet`: in the cool-down after a rollback."""
        return not math.isfinite(delta) or (delta > self.threshold and not quiet)

    def update_ema(self, perplexity: float) -> None:
        """Let a healthy value into the average, which is geometric: the mean of losses, as a perplexity.

        An arithmetic one would be held up for hundreds of steps by what an untrained model starts with.
        """
        old = perplexity if self.ema is None else self.ema
        self.ema = old ** (1 - self.smoothing) * perplexity**self.smoothing

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError if the module cannot be probed, or takes its optimizer steps itself."""
        if stage == "fit":
            self.reset()
        if self.watch == "held_out" and not isinstance(pl_module, HasHeldOutLoss):
            raise TypeError(
                f"spike_rollback needs held_out_loss(batch), which {type(pl_module).__name__} does not have"
            )
        if not pl_module.automatic_optimization:
            raise TypeError("spike_rollback cannot rewind a module that takes its optimizer steps by itself")
        open_step_ends(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate once; take over the snapshots of a resumed run, or keep the state that training starts from.

        TrainingUnstable: these weights are broken, or were saved in a spike, and there is nothing to go back to.
        """
        begin_step_losses(trainer)
        enter(trainer, loss_not_finite=loss_not_finite)
        self._losses, self._requested = [], None
        if begins(trainer):
            self.ema = None  # also of a run that is resumed from before its first step
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        if self.watch == "held_out":
            self._batch = held_out_batch(trainer, self.rows, "spike_rollback")
        measured = self._what_is_measured(trainer)
        if self.ema_of not in ("", measured):
            self.ema = None  # another text, or the training loss: not to be compared with
        self.ema_of = measured
        self.snapshots, self._constants = [], {}
        if self.mode == "act" and not begins(trainer):
            self.snapshots, self._constants = self._snapshots_in_folder(trainer), constants(pl_module)
        if self.watch == "held_out":
            perplexity = self._perplexity(trainer, pl_module)
            delta = self.delta(perplexity)
            record_start(trainer, self._values(perplexity, delta))
            self._judge_start(trainer, perplexity, delta)
            if self.ema is None and math.isfinite(perplexity):
                self.update_ema(perplexity)
        record_start(trainer, self._counters())
        if self.mode == "act" and (not self.snapshots or self._has_lost_the_newest(trainer)):
            self._keep(trainer, pl_module)
            self._write_newest(trainer)

    def _judge_start(self, trainer: Trainer, perplexity: float, delta: float) -> None:
        """A resumed run that can go back is judged when it would have been, had it not been interrupted: a checkpoint
        between two evaluations may lie above the average in a run that is healthy at both."""
        finite = math.isfinite(perplexity)
        if not self.judge(delta) or (self.mode == "observe" and finite):
            return
        found = f"the held-out perplexity is {perplexity:.4g}" + (f", {delta:+.1%} above its average" if finite else "")
        if self.snapshots:
            if trainer.is_global_zero:
                log.warning(
                    "%s, where this run is resumed: if that is still so at the next evaluation, it goes back to %s",
                    found, (self.snapshots[:-1] or self.snapshots)[-1].path,
                )  # fmt: skip
        elif begins(trainer):  # which has no average yet
            raise TrainingUnstable(
                f"{found} before the first step: the weights that this run starts from are broken, start from others"
            )
        else:
            why = (
                ""
                if self.mode == "observe"
                else f", and {str(self.folder)!r} has no snapshot of this run to go back to"
            )
            raise TrainingUnstable(
                f"{found}, before any step: this checkpoint was written in a spike{why}: {self._earlier(trainer)}"
            )

    def _earlier(self, trainer: Trainer) -> str:
        """The newest snapshot beside the checkpoint that was resumed, of an earlier moment, as advice."""
        beside = by_step(Path(trainer.ckpt_path).resolve().parent, "snapshot") if trainer.ckpt_path else []
        now = position_now(trainer)
        earlier = [path for path in beside if (at := position(path)) is not None and at < now]
        return f"resume an earlier one, {earlier[-1]}" if earlier else "resume an earlier one"

    def _snapshots_in_folder(self, trainer: Trainer) -> list[StoredSnapshot]:
        """Those that the resumed run had at this moment and that are still there, the oldest first; alike on all ranks.

        Of a checkpoint that does not say which: the newest in the folder that are not later.
        """
        now, found = position_now(trainer), []
        if trainer.is_global_zero:
            if self._ring is None:
                there = [(path, position(path)) for path in by_step(self.folder, "snapshot")]
                found = [(path, at) for path, at in there if at is not None and at <= now][-self.keep_last :]
            else:
                ring = [(self.folder / name, (stepped, step)) for name, stepped, step in self._ring]
                found = [(path, at) for path, at in ring if path.is_file() and position(path) == at]
        return [StoredSnapshot(None, path, at, None) for path, at in trainer.strategy.broadcast(found)]

    def _has_lost_the_newest(self, trainer: Trainer) -> bool:
        """Whether a snapshot was taken of this very moment, and the process ended before its file was there."""
        if not self._ring:
            return False
        return self._ring[-1][1:] == position_now(trainer) and self.snapshots[-1].position != position_now(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note it."""
        note_loss(trainer, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if it is time, or if the loss was not finite."""
        if accumulates(trainer):
            return
        alarm = bool(vote(trainer, pl_module, "loss_not_finite"))
        self._losses += step_losses(trainer) if self.watch == "training_loss" else []
        due = trainer.global_step % self.every_n_steps == 0
        seen = self.watch == "held_out" or bool(self._losses)  # a training_step may skip every batch in between
        if self._requested is not None:
            self._roll_back_on_request(trainer, pl_module, self._requested)
        elif seen and (due or alarm):
            self.evaluate(trainer, pl_module, due)
        if is_logging_step(trainer):
            record(trainer, self._counters())

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file of a new snapshot, now that the step is complete."""
        if self._unwritten:
            flush_records(trainer)
            self._write_newest(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All files are there afterwards. Raises what the disk does."""
        wait_for_files(trainer)

    def request_rollback(self, reason: str) -> None:
        """Return at the end of this step, whatever the perplexity; to be called on every rank. `reason`: for the log.

        TrainingUnstable: in mode observe there is nothing to return to.
        """
        if self.mode == "observe":
            raise TrainingUnstable(f"{reason}, and spike_rollback only observes: resume the last checkpoint")
        self._requested = reason

    def _roll_back_on_request(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        self._requested, self._losses = None, []
        self.spikes.append(trainer.global_step)
        self._roll_back(trainer, pl_module, reason)
        record(trainer, self._counters())

    def evaluate(self, trainer: Trainer, pl_module: LightningModule, due: bool) -> None:
        """Measure, judge, act. Not `due`: a loss was not finite; no snapshot is taken, and the average stays."""
        perplexity = self._perplexity(trainer, pl_module)
        self._losses = []
        delta, step = self.delta(perplexity), trainer.global_step
        spike = self.judge(delta, quiet=self._now(trainer) < self.cooldown_until)
        if spike:
            self.spikes.append(step)
        record(trainer, self._values(perplexity, delta))
        record(trainer, self._counters())
        if spike and self.mode == "act":
            rise = f"{delta:+.1%} above its average" if math.isfinite(delta) else "not finite"
            self._roll_back(
                trainer, pl_module, f"{'held-out' if self.watch == 'held_out' else 'training'} perplexity {rise}"
            )
            record(trainer, self._counters())
        if due and not spike and delta <= self.threshold:
            self.update_ema(perplexity)
            if self.mode == "act" and not blocks_snapshot(trainer):
                self._keep(trainer, pl_module)
        elif due and self.mode == "observe" and math.isfinite(perplexity):
            self.update_ema(perplexity)

    # State that survives a resume

    def state_dict(self) -> dict[str, Any]:
        """The counters, the average, and of each snapshot the name of its file and its position."""
        return {
            "ema": self.ema,
            "ema_of": self.ema_of,
            "rollbacks": self.rollbacks,
            "spikes": list(self.spikes),
            "quiet_until": self.cooldown_until,
            "ring": [[kept.path.name, *kept.position] for kept in self.snapshots if kept.path is not None],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.ema, self.rollbacks = state_dict["ema"], state_dict["rollbacks"]
        self.ema_of = state_dict.get("ema_of", "")  # older checkpoints do not say
        self.spikes, self.cooldown_until = list(state_dict["spikes"]), state_dict["quiet_until"]
        ring = state_dict.get("ring")
        self._ring = None if ring is None else [(str(name), int(stepped), int(step)) for name, stepped, step in ring]

    # Parts

    def _values(self, perplexity: float, delta: float) -> dict[str, float]:
        return {
            "spike_rollback/ppl": perplexity,
            "spike_rollback/ema": math.nan if self.ema is None else self.ema,
            "spike_rollback/ppl_delta": delta,
            "spike_rollback/threshold": self.threshold,
        }

    def _counters(self) -> dict[str, float]:
        rollbacks = float(self.rollbacks)
        return {
            "spike_rollback/count": float(len(self.spikes)),
            "spike_rollback/rollbacks": rollbacks,
            "spike_rollback/timeline": rollbacks,
        }

    def _now(self, trainer: Trainer) -> int:
        """Training steps so far, those of abandoned timelines included."""
        return logging_step(trainer)

    def _perplexity(self, trainer: Trainer, pl_module: LightningModule) -> float:
        if self.watch == "training_loss":
            loss = torch.stack(self._losses).double().mean()
        else:
            assert isinstance(pl_module, HasHeldOutLoss)
            with undisturbed(trainer, pl_module):
                loss = pl_module.held_out_loss(self._batch)
        mean = float(mean_over_ranks(trainer, loss.detach().float()))
        return math.exp(mean) if mean < 700 else mean * math.inf  # e^700 is about the largest float; NaN stays NaN

    def _what_is_measured(self, trainer: Trainer) -> str:
        """The same on all ranks: rank zero's held-out batch, and how many there are."""
        if self.watch != "held_out":
            return self.watch
        digest = hashlib.blake2b(digest_size=8)
        for leaf in tree_leaves(self._batch):
            if isinstance(leaf, Tensor):
                digest.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return trainer.strategy.broadcast(f"held_out {trainer.world_size} {digest.hexdigest()}")

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a snapshot of this step; the file follows when the step is complete."""
        path = self._path(trainer)
        self.snapshots = [kept for kept in self.snapshots if kept.path != path or path is None]
        self.snapshots.append(StoredSnapshot(take(trainer, pl_module), path, position_now(trainer), self.ema))
        self.snapshots, self._unwritten = self.snapshots[-self.keep_last :], True

    def _path(self, trainer: Trainer) -> Path | None:
        # before its first step an optimizer has no moments, and saving sharded ones would make some
        fresh = not any(optimizer.state for optimizer in trainer.optimizers)
        if fresh and isinstance(trainer.strategy, ModelParallelStrategy):
            return None
        return self.folder / f"snapshot-{trainer.global_step:07d}.ckpt"

    def _write_newest(self, trainer: Trainer) -> None:
        """The file of the newest snapshot, which is the run as it is now; and the oldest file goes."""
        self._unwritten = False
        path = self._path(trainer)
        if path is not None:
            trainer.save_checkpoint(path, weights_only=False)
        self.snapshots[-1] = self.snapshots[-1]._replace(path=path, position=position_now(trainer))
        snapshots = {kept.path for kept in self.snapshots}
        after_writing(trainer, lambda: self._remove_oldest(trainer, snapshots))

    @rank_zero_only  # others would list files that are just being removed
    def _remove_oldest(self, trainer: Trainer, snapshots: set[Path | None]) -> None:
        """Those that are no snapshot of this process go first: a process that was killed left them."""
        others = [path for path in by_step(self.folder, "snapshot") if path not in snapshots]
        for path in others[: max(0, len(others) + len(snapshots) - self.keep_last)]:
            trainer.strategy.remove_checkpoint(path)

    def _roll_back(self, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
        """Return to the second most recent snapshot: the most recent may hold what led to the spike already."""
        wait_for_files(trainer)  # a file that comes after this would be taken for one of the new timeline
        seen, kept = trainer.global_step, self._return_to(trainer, pl_module)
        later = [other for other in self.snapshots if other.position > kept.position]
        for spoiled in later:
            if spoiled.path is not None:
                trainer.strategy.remove_checkpoint(spoiled.path)
        self.snapshots = self.snapshots[: len(self.snapshots) - len(later)]
        self._abandon(trainer, kept)
        self.snapshots[-1] = kept._replace(position=position_now(trainer))  # of the file that is about to be written
        trainer.strategy.barrier("spike_rollback")
        self.cooldown_until = self._now(trainer) + self.cool_down_steps
        if self.rollbacks >= self.max_rollbacks:
            self._write_newest(trainer)
            raise TrainingUnstable(
                f"{why} at step {seen}: the spike number {len(self.spikes)} of this run (steps "
                f"{', '.join(map(str, self.spikes))}), and max_rollbacks={self.max_rollbacks} have been made: "
                f"the last good checkpoint is {kept.path or 'what this run started from'}; resume it with a lower "
                "optim.lr, or look at the data"
            )
        self.rollbacks += 1
        self._unwritten = True  # the file has to know of the rollback, and where the data is
        if trainer.is_global_zero:
            log.warning(
                "spike: %s at step %d: back to step %d (rollback %d of at most %d), data continues",
                why, seen, trainer.global_step, self.rollbacks, self.max_rollbacks,
            )  # fmt: skip

    def _return_to(self, trainer: Trainer, pl_module: LightningModule) -> StoredSnapshot:
        """Restore the second most recent snapshot, or else one before it, or else the most recent, and return it.

        TrainingUnstable: none can be read.
        """
        *before, newest = self.snapshots
        for candidate in (*reversed(before), newest):
            if candidate.snapshot is not None:
                restore(trainer, pl_module, candidate.snapshot)
                self.ema = candidate.ema
                return candidate
            assert candidate.path is not None
            error: Any = None if position(candidate.path) else "it is not there, or damaged"
            state: dict[str, Any] = {}
            fails = any_rank(trainer, error is not None)  # before a load in which ranks wait for each other
            if not fails:
                try:
                    state = restore_file(trainer, pl_module, candidate.path, self._constants)
                except Exception as caught:  # what a damaged file makes its readers raise has no end
                    error = caught
                fails = any_rank(trainer, error is not None)
            if fails:
                log.warning("cannot go back to %s: %s", candidate.path, error or "another rank cannot read it")
                self.snapshots = [other for other in self.snapshots if other is not candidate]
                continue
            own = state["callbacks"].get(self.state_key, {})
            self.ema = own.get("ema") if own.get("ema_of") == self.ema_of else self.ema
            return candidate
        raise TrainingUnstable(
            f"{str(self.folder)!r} has no snapshot that can be read, see above: resume an earlier checkpoint"
        )

    @rank_zero_only
    def _abandon(self, trainer: Trainer, kept: StoredSnapshot) -> None:
        """Mark every checkpoint that was written after `kept`, so that nobody resumes what was found to be bad."""
        others = (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
        folders = {self.folder, *(Path(folder) for folder in others if folder)}
        for folder in folders:
            for path in folder.glob("*.ckpt"):
                if path == kept.path or path.is_symlink():
                    continue
                written = position(path)
                if written is None:
                    log.warning("%s does not say at which step it was written: it may hold what was rolled back", path)
                elif written > kept.position:
                    path.rename(path.with_name(f"{path.name}{ABANDONED}{self.rollbacks + 1}"))
            for path in folder.glob("*.ckpt"):
                if path.is_symlink() and not path.exists():
                    path.unlink()
