"""End the run on all ranks when one of them stops answering: without it the others wait for it without end.

Watches:  a sign that each rank's own thread gives every second, and where its training thread is: step, phase, last
          vote (`support/collectives.py`). A rank is gone when its sign has not changed for `timeout_s` (stopped,
          killed, its machine lost); the run is stalled when signs go on, but no rank has got any further for
          `stalled_s`.
Acts:     the ranks that are left name the silent one on stderr and in the log, cut the connections to it, so that the
          collective in which they wait fails, and raise RankSilent; its process is killed if it is on this machine. A
          rank that cannot raise ends with exit code 1 after `GRACE_S`.
Logs:     nothing.
Requires: any LightningModule; Linux, to cut the connections. With one rank nothing runs.
Source:   gloo waits for 30 minutes, and NCCL's own watchdog does not know which rank is missing.

How the caller gets RankSilent: the training thread fails with whatever its collective raises. Lightning's way for
exceptions is gone in full (`on_exception` of all callbacks, the loggers' end, the strategy's end), and `Trainer.fit`
raises RankSilent from the first error in its place. A connection that breaks because a rank has died is treated alike:
`on_exception` waits until it is known whose it was.
"""

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.support import collectives as ranks

log = logging.getLogger(__name__)

EVERY_S = 1.0  # between signs
AWAKE_S = 2.0  # longer gaps of the watch itself are no silence of others: this machine was suspended, or a step held it
GRACE_S = 5.0  # from the message to the end of a process that does not end by itself
DONE = "done"


class RankSilent(RuntimeError):
    """A rank has stopped answering, or none gets any further."""


class Sign(NamedTuple):
    """What a rank tells the others of itself."""

    beat: int  # grows with every sign
    progress: int  # grows with every note of the training thread
    idle: float  # seconds since it last grew
    step: int
    phase: str
    vote: str  # the last of callbacks.support.collectives
    host: str
    pid: int
    birth: str  # tells the process from others that get its id later
    ended: str = ""  # "done", or the exception with which this rank has left fit

    def who(self, rank: int) -> str:
        return f"rank {rank} (host {self.host}, pid {self.pid})"

    def where(self) -> str:
        return f"step {self.step}, {self.phase} (last vote: {self.vote})"


class Verdict(NamedTuple):
    """Who is to blame, and what is to be said of it."""

    message: str
    silent: list[int]
    store: bool = False  # whether the store does not answer either


class Judge:
    """Decides from signs and seconds; knows nothing of threads and processes."""

    def __init__(self, rank: int, world_size: int, timeout_s: float, stalled_s: float, host: int | None = 0) -> None:
        self.rank, self.timeout_s, self.stalled_s = rank, timeout_s, stalled_s
        self.host = host  # rank whose process is the store; None: a process apart
        self.signs: list[Sign | None] = [None] * world_size
        self.silent = [0.0] * world_size  # seconds
        self.store_silent = 0.0
        self._rounds = 0

    def hear(self, signs: list[Sign | None], rounds: int, seconds: float) -> None:
        """The newest signs, how often the store has answered so far, and how much time went by since the last call."""
        self.store_silent = 0.0 if rounds != self._rounds else self.store_silent + seconds
        self._rounds = rounds
        for rank, (old, new) in enumerate(zip(self.signs, signs, strict=True)):
            same = new is None or (old is not None and new.beat == old.beat)
            self.silent[rank] = self.silent[rank] + seconds if same else 0.0
        self.signs = list(signs)

    def verdict(self, lost_connection: bool = False) -> Verdict | None:
        """None while all is well. `lost_connection`: a rank that has left with an exception explains it at once."""
        mine = self.signs[self.rank]
        if mine is None:
            return None
        others = [(rank, sign) for rank, sign in enumerate(self.signs) if rank != self.rank and sign is not None]
        failed = [(rank, sign) for rank, sign in others if sign.ended not in ("", DONE)]
        late = [(rank, sign) for rank, sign in failed if lost_connection or self.silent[rank] >= self.timeout_s]
        if late:
            told = "; ".join(f"{s.who(rank)} has left the run at {s.where()}: {s.ended}" for rank, s in late)
            return self._told(told, mine, [], "the cause is there")
        gone = [(r, s) for r, s in others if not s.ended and self.silent[r] >= self.timeout_s]
        store = self.store_silent >= self.timeout_s
        if store:  # then nobody can be heard; who was silent before that is to blame, else who keeps the store
            before = [(r, s) for r, s in gone if self.silent[r] > self.store_silent + 3 * EVERY_S]
            gone = before or [(r, s) for r, s in gone if r == self.host]
            if not gone and self.host is not None:
                return None  # it has done its work and left
            if not gone:
                return self._told("the store of the process group does not answer", mine, [], "", store=True)
        if gone:
            told = "; ".join(
                f"{s.who(rank)} has been silent for {self.silent[rank]:.0f} s, its last sign came from {s.where()}"
                for rank, s in gone
            )
            remedy = "its process was stopped or killed, or its machine is lost: look there (dmesg)"
            return self._told(told, mine, [rank for rank, _ in gone], remedy, store)
        if others and all(sign.idle >= self.stalled_s and not sign.ended for _, sign in [*others, (self.rank, mine)]):
            return self._stalled(mine, others)
        return None

    def _stalled(self, mine: Sign, others: list[tuple[int, Sign]]) -> Verdict:
        everyone = sorted([*others, (self.rank, mine)], key=lambda pair: pair[0])
        least, most = (f(sign.progress for _, sign in everyone) for f in (min, max))
        behind = [(rank, sign) for rank, sign in everyone if sign.progress == least < most]
        told = "; ".join(f"{sign.who(rank)} lags, at {sign.where()}" for rank, sign in behind) or "all are at one place"
        return self._told(
            f"no rank has got any further for {self.stalled_s:.0f} s: {told}", mine, [],
            "a deadlock, or stalled_s of hang_watch is too short for this run",
        )  # fmt: skip

    def _told(self, told: str, mine: Sign, silent: list[int], remedy: str, store: bool = False) -> Verdict:
        waits = f"{mine.who(self.rank)} waits at {mine.where()}"
        steps = "; ".join(x for x in (remedy, "then resume the last checkpoint") if x)
        return Verdict(f"{told}. {waits}. Remedy: {steps}", silent, store)


class Watch:
    """The two threads of one fit: one speaks to the store, which may block without end; one judges and acts."""

    def __init__(self, judge: Judge, store: Any, port: int | None) -> None:
        self.judge, self.store, self.port = judge, store, port
        self.at = (0, 0, "set-up")  # progress, step, phase; the training thread replaces it
        self.verdict: Verdict | None = None
        self.judged = threading.Event()
        self.lost_connection = False
        self._ended = ""
        self._end = threading.Event()
        self._signs: list[Sign | None] = [None] * len(judge.signs)
        self._rounds = 0
        self._main = threading.get_ident()
        self._last_resort = threading.Timer(GRACE_S, self._exit)
        self._last_resort.daemon = True
        self._threads = [
            threading.Thread(target=target, name=f"hang_watch {target.__name__}", daemon=True)
            for target in (self._speak, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def note(self, step: int, phase: str) -> None:
        """The training thread has got there."""
        self.at = (self.at[0] + 1, step, phase)

    def stop(self, ended: str) -> None:
        """End the threads; the others learn how this rank has left."""
        self._ended = ended
        self._end.set()
        self._last_resort.cancel()
        for thread in self._threads:
            thread.join(timeout=3 * EVERY_S)  # a store that does not answer may keep one: it is a daemon

    # The thread that speaks

    def _speak(self) -> None:
        rank, count, advanced, last = self.judge.rank, len(self._signs), time.monotonic(), -1
        host, pid, birth, known = socket.gethostname(), os.getpid(), birth_of(os.getpid()), {rank: True}
        beat = 0
        while True:
            ending = self._end.is_set()
            (notes, step, phase), (votes, vote) = self.at, ranks.entered
            if notes + votes != last:
                last, advanced = notes + votes, time.monotonic()
            beat += 1
            idle = time.monotonic() - advanced
            sign = Sign(beat, last, round(idle, 1), step, phase, vote, host, pid, birth, self._ended)
            self._signs[rank] = sign
            try:
                self.store.set(str(rank), json.dumps(sign))
                for other in range(count):
                    known[other] = known.get(other, False) or self.store.check([str(other)])
                heard = [other for other in range(count) if known[other] and other != rank]
                for other, told in zip(heard, self.store.multi_get([str(other) for other in heard]), strict=True):
                    self._signs[other] = Sign(*json.loads(told))
                self._rounds += 1
            except (RuntimeError, ValueError) as error:  # the store is gone; the other thread measures for how long
                log.debug("the store of the process group: %s", error)
            if ending:
                return
            self._end.wait(EVERY_S)

    # The thread that listens

    def _listen(self) -> None:
        last = time.monotonic()
        while not self._end.wait(EVERY_S / 2):
            now = time.monotonic()
            self.judge.hear(list(self._signs), self._rounds, min(now - last, AWAKE_S))
            last = now
            verdict = self.judge.verdict(self.lost_connection)
            if verdict is not None:
                self._act(verdict)
                return

    def _act(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self._last_resort.start()
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)[-8:]) if frame else ""
        sys.stderr.write(f"hang_watch: {verdict.message}\nThe training thread of this rank is at\n{stack}")
        sys.stderr.flush()
        if log.hasHandlers():
            log.critical("%s", verdict.message)
        self.judged.set()
        for sign in (self._signs[rank] for rank in verdict.silent):
            if sign is not None and sign.birth and birth_of(sign.pid) == sign.birth:
                os.kill(sign.pid, signal.SIGKILL)  # a stopped process would keep its memory and its ports for ever
        if self._end.is_set() or self.lost_connection:
            return
        cut_connections(None if verdict.store else self.port)
        if dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
            dist.distributed_c10d._abort_process_group()

    def _exit(self) -> None:
        sys.stderr.write(f"hang_watch: this rank cannot raise, it ends here. {self.verdict and self.verdict.message}\n")
        sys.stderr.flush()
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)


def birth_of(pid: int) -> str:
    """What tells this process from every other; empty where that cannot be known."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {start}"
    except OSError:
        return ""


def cut_connections(spared_port: int | None) -> None:
    """Shut every TCP connection that was opened neither by Python nor with `spared_port`: gloo's and NCCL's."""
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return  # not Linux: the last resort ends this process
    python = {x.fileno() for x in gc.get_objects() if isinstance(x, socket.socket)}
    for descriptor in set(descriptors) - python:
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue  # no socket
        with connection:
            try:
                ports = {connection.getsockname()[1], connection.getpeername()[1]}
                if connection.family in (socket.AF_INET, socket.AF_INET6) and spared_port not in ports:
                    connection.shutdown(socket.SHUT_RDWR)
            except (OSError, IndexError):
                pass  # not connected, or no TCP


class HangWatch(Callback):
    """`timeout_s`: silence after which a rank is gone. `stalled_s`: seconds without progress on any rank.

    Both in seconds; ValueError: `timeout_s` below 5 or `stalled_s` not above it.
    """

    def __init__(self, timeout_s: float = 20, stalled_s: float = 600) -> None:
        if timeout_s < 5:
            raise ValueError(f"timeout_s={timeout_s} of hang_watch must be at least 5: signs come every second")
        if stalled_s <= timeout_s:
            raise ValueError(f"stalled_s={stalled_s} of hang_watch must be more than timeout_s={timeout_s}")
        self.timeout_s, self.stalled_s = timeout_s, stalled_s
        self._watch: Watch | None = None

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
        self._watch = Watch(judge, dist.PrefixStore(f"hang_watch {name}", whole.clone()), _port(whole))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The end of a fit that went well."""
        self._stop(DONE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The end of one that did not. Where a rank is to blame, have `fit` raise RankSilent."""
        watch = self._watch
        if watch is None:
            return
        if _is_of_connection(exception) and watch.verdict is None:
            watch.lost_connection = True
            watch.note(trainer.global_step, "a broken connection")
            watch.judged.wait(self.timeout_s + 5 * EVERY_S)
        verdict = watch.verdict
        self._stop((f"RankSilent: {verdict.message}" if verdict else f"{type(exception).__name__}: {exception}")[:500])
        if verdict is not None and not isinstance(exception, RankSilent):
            _raise_at_the_end(trainer, RankSilent(verdict.message), exception)

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


def _port(store: Any) -> int | None:
    """That of a TCPStore, under whatever prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "port", None)


def _is_of_connection(exception: BaseException) -> bool:
    """Whether it comes from a collective; gloo has no type of its own."""
    return isinstance(exception, dist.DistError) or (isinstance(exception, RuntimeError) and "gloo" in str(exception))


def _raise_at_the_end(trainer: Trainer, error: Exception, cause: BaseException) -> None:
    """Have `fit` raise `error` from `cause`, once all has been told of `cause`: Lightning has no way to replace it."""
    teardown = trainer._teardown

    def teardown_and_raise() -> None:
        del trainer._teardown  # this function, not the method
        try:
            teardown()
        finally:
            raise error from cause

    trainer._teardown = teardown_and_raise  # type: ignore[method-assign]
