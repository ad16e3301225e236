"""End the run on all ranks when one of them stops answering: without it the others wait for it without end.

Watches:  a sign that each rank's own thread gives every second, and where its training thread is: step, phase, last
          vote (`support/collectives.py`). A rank is gone when its sign has not changed for `timeout_s` (stopped,
          killed, its machine lost); the run is stalled when signs continue, but no rank has got any further for
          `stalled_s`.
Acts:     the ranks that are left name the silent one on stderr and in the log, cut the connections to it, so that the
          collective in which they wait fails, and raise RankSilent; its process is killed if it is on this machine. A
          rank that cannot raise ends with exit code 1 after `GRACE_S` of support/heartbeat.py.
Logs:     nothing.
Requires: any LightningModule; Linux, to cut the connections. With one rank nothing runs.
Source:   gloo waits for 30 minutes, and NCCL's own watchdog does not know which rank is missing.

How the caller gets RankSilent: the training thread fails with whatever its collective raises. Lightning's way for
exceptions is gone in full (`on_exception` of all callbacks, the loggers' end, the strategy's end), and `Trainer.fit`
raises RankSilent from the first error in its place. A connection that breaks because a rank has died is treated alike:
`on_exception` waits until it is known whose it was.
"""

import os
import uuid
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.support.connections import is_of_connection, let_nccl_fail_softly, port_of
from callbacks.support.hang_judge import DONE, EVERY_S, Judge
from callbacks.support.heartbeat import Heartbeat
from callbacks.support.lightning_internals import raise_after_teardown
from callbacks.support.ranges import Range, at_least, check


class RankSilent(RuntimeError):
    """A rank has stopped answering, or none gets any further."""


class HangWatch(Callback):
    """`timeout_s`: silence after which a rank is gone. `stalled_s`: seconds without progress on any rank.

    Both in seconds; ValueError: `timeout_s` below 5 or `stalled_s` not above it.
    """

    def __init__(self, timeout_s: float = 20, stalled_s: float = 600) -> None:
        longer = Range(lambda value: value > timeout_s, f"be more than timeout_s={timeout_s}")
        check(
            "hang_watch", timeout_s=(timeout_s, at_least(5, "signs come every second")), stalled_s=(stalled_s, longer)
        )  # fmt: skip
        self.timeout_s, self.stalled_s = timeout_s, stalled_s
        self._watch: Heartbeat | None = None
        let_nccl_fail_softly()  # now: the process group is made before `setup`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch, on all ranks, over a connection to the process group's store that is nobody else's."""
        if stage != "fit" or trainer.world_size == 1:
            return
        name = trainer.strategy.broadcast(uuid.uuid4().hex)  # one per fit
        whole: Any = dist.distributed_c10d._get_default_store()
        apart = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        judge = Judge(
            trainer.global_rank, trainer.world_size, self.timeout_s, self.stalled_s, host=None if apart else 0
        )
        self._watch = Heartbeat(judge, dist.PrefixStore(f"hang_watch {name}", whole.clone()), port_of(whole))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The end of a fit that went well."""
        self._stop(DONE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The end of one that did not. Where a rank is to blame, have `fit` raise RankSilent."""
        watch = self._watch
        if watch is None:
            return
        if is_of_connection(exception) and watch.verdict is None:
            watch.lost_connection = True
            watch.note(trainer.global_step, "a broken connection")
            watch.judged.wait(self.timeout_s + 5 * EVERY_S)
        verdict = watch.verdict
        self._stop((f"RankSilent: {verdict.message}" if verdict else f"{type(exception).__name__}: {exception}")[:500])
        if verdict is not None and not isinstance(exception, RankSilent):
            raise_after_teardown(trainer, RankSilent(verdict.message), exception)

    def _stop(self, ended: str) -> None:
        if self._watch is not None:
            self._watch.stop(ended)
            self._watch = None

    def _note(self, trainer: Trainer, phase: str) -> None:
        """The training thread is here. RankSilent: it is free to raise."""
        if self._watch is not None:
            if self._watch.verdict is not None:
                raise RankSilent(self._watch.verdict.message)
            self._watch.note(trainer.global_step, phase)

    # Where the training thread is

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, "set-up, model in place")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, "start of training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._note(trainer, "forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._note(trainer, "backward, gradients all-reduced")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, "gradients there")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._note(trainer, "optimizer step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note(trainer, "end of the step, next batch")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, "validation")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._note(trainer, f"validation, batch {batch_idx}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, "end of validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._note(trainer, "saving a checkpoint")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, "end of training")
