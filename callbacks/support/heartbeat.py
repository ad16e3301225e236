"""The signs that ranks give each other, over the process group's store, and what is done when one is missing."""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from callbacks.support import collectives
from callbacks.support.connections import birth_of, end_collectives
from callbacks.support.hang_judge import EVERY_S, Judge, Sign, Verdict

log = logging.getLogger(__name__)

AWAKE_S = 2.0  # longer gaps of the watch itself are no silence of others: this machine was suspended, or a step held it
GRACE_S = 5.0  # from the message to the end of a process that does not end by itself


class Heartbeat:
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
            (notes, step, phase), (votes, vote) = self.at, collectives.entered
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
                for other, reported in zip(heard, self.store.multi_get([str(other) for other in heard]), strict=True):
                    self._signs[other] = Sign(*json.loads(reported))
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
        end_collectives(None if verdict.store else self.port)

    def _exit(self) -> None:
        sys.stderr.write(f"hang_watch: this rank cannot raise, it ends here. {self.verdict and self.verdict.message}\n")
        sys.stderr.flush()
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)
