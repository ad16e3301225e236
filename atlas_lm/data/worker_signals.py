"""Loader workers outlive the signals that schedulers and terminals send to whole process groups."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# what terminals and schedulers send to groups
TO_A_GROUP = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals to this thread while this is open; processes that it starts begin so, see `outlive_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_A_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker: int) -> None:
    """A loader worker (`worker_init_fn`) works on until the process that it works for ends it, or has ended.

    A signal to the whole process group is meant for that process, which needs its workers to finish the step.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_A_GROUP)
    threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()


def _end_when_the_parent_asks() -> None:
    while True:
        sent = signal.sigwaitinfo({signal.SIGTERM})
        if sent.si_pid == os.getppid():
            os._exit(0)
