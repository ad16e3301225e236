"""A thread that delivers, so that whoever has something to report never waits for a network.

A backend that is down costs its caller nothing: what is reported is queued, tried again after growing pauses, and then
the log says so, in one line. The newest figures are kept in bounded memory and tried on, until the backend returns.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable

from atlas_lm.loggers.senders.metric import Bound, Metric, Sender

log = logging.getLogger(__name__)

QUEUE = 1024  # batches
CLOSE = 2.0  # seconds
ATTEMPTS = 4  # before the log says that a backend is down
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds; each pause is twice the one before


class Delivery:
    """Takes batches of metrics and gives them to `sender` in a thread of its own."""

    def __init__(self, sender: Sender, attempts: int = ATTEMPTS, first_pause: float = FIRST_PAUSE) -> None:
        self.sender = sender
        self.attempts = attempts
        self.first_pause = first_pause
        self._bound = Bound()
        self._queue: deque[list[Metric]] = deque(maxlen=QUEUE)
        self._changed = threading.Condition()
        self._is_sending = False
        self._is_asked = False  # to push now, whatever the sender's interval
        self._is_closing = False
        self._failures = 0  # since the last push that worked
        self._error = ""  # of the last push; empty where it worked
        self._is_said = False
        self._thread = threading.Thread(target=self._run, name=f"deliver-{sender.name}", daemon=True)
        self._thread.start()

    def send(self, metrics: Iterable[Metric]) -> None:
        """Queue a batch. Neither waits nor raises; the oldest batch gives way where the queue is full."""
        with self._changed:
            self._queue.append(self._bound(metrics))
            self._changed.notify_all()

    def flush(self, seconds: float) -> str:
        """Wait until all is delivered, the sender has failed as often as it is tried, or the time is up.

        "" if it is delivered, else why not.
        """
        with self._changed:
            self._is_asked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_done() or self._is_said, seconds)
            self._is_asked = False
            if self._is_done():
                return ""
            return self._error or f"no answer within {seconds:.0f} s"

    def stop(self) -> None:
        """Begin to close, without waiting for it: several close in the time of one."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def close(self, seconds: float = CLOSE) -> None:
        """Try what is left once more and end the thread; after `seconds` and the sender's `linger` it is left alone."""
        self.stop()
        self._thread.join(seconds + self.sender.linger)
        if self._thread.is_alive():
            self._say(self._error or f"no answer within {seconds:.0f} s")

    def _is_done(self) -> bool:
        return not self._queue and not self._is_sending and not self._failures

    def _run(self) -> None:
        due = 0.0
        while True:
            with self._changed:
                while not self._is_closing and not self._may_push(due):
                    waits = bool(self._queue or self._failures)
                    self._changed.wait(max(0.0, due - time.monotonic()) if waits else None)
                batch = [metric for metrics in self._queue for metric in metrics]
                self._queue.clear()
                self._is_sending, closing = True, self._is_closing
            if batch or self._failures:
                self._push(batch, closing)
            due = time.monotonic() + (self._pause() if self._failures else self.sender.interval)
            with self._changed:
                self._is_sending = False
                self._changed.notify_all()
            if closing:
                self.sender.close()
                return

    def _may_push(self, due: float) -> bool:
        if self._failures:
            return time.monotonic() >= due
        return bool(self._queue) and (self._is_asked or time.monotonic() >= due)

    def _pause(self) -> float:
        return min(LONGEST_PAUSE, self.first_pause * 2.0 ** (self._failures - 1))

    def _push(self, batch: list[Metric], is_last: bool) -> None:
        try:
            self.sender.take(batch)
            self.sender.push()
        except Exception as error:  # whatever a client raises: it may not end what it reports on
            self._error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._failures += 1
            if self._failures >= self.attempts or is_last:
                self._say(self._error)
            return
        if self._is_said:
            log.info("sink %s is back", self.sender.name)
        self._failures, self._error, self._is_said = 0, "", False

    def _say(self, why: str) -> None:
        with self._changed:  # whoever waits for it finds the line in the log
            if self._is_said:
                return
            log.warning(
                "sink %s does not take what is sent (%s): tried %d times, and on until the end",
                self.sender.name, why, max(1, self._failures),
            )  # fmt: skip
            self._is_said = True
            self._changed.notify_all()
