"""Signals that ask a process to end soon: SIGTERM and SIGUSR1, as schedulers send them before they preempt a job.

The process ends with an exit code that asks for it to be started again, wherever it is: while Python still imports,
before training and after it here, in training by `callbacks.interrupt`. Imports the standard library alone, so that
`train.py` can call `exit_when_preempted` before the imports that take seconds.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h; as callbacks.interrupt.requeue_exit_code is by default
INTERRUPTED = 130  # as shells have it: ended by Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ATTEMPTS = 20  # as many as a killed process gets: conf/launcher/slurm.yaml


class EndedBySignal(SystemExit):
    """A signal has ended the process while there was nothing to save."""

    def __init__(self, code: int, number: int) -> None:
        super().__init__(code)
        self.signal = number

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name}, there was nothing to save"


def exit_when_preempted() -> None:
    """From now on a signal ends this process at once, Ctrl-C too: there is nothing yet that could be lost."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, _exit_at_once)


_nothing_is_left = False  # to be started again for


def ignore_from_now_on() -> None:
    """All is trained, and the verdict is about to be written: who is started again would train everything again."""
    global _nothing_is_left
    _nothing_is_left = True


_waits = False  # for jobs, which do the work


def only_wait_from_now_on() -> None:
    """Jobs of SLURM were submitted: a process that is ended by a signal and started again would submit them again."""
    global _waits
    _waits = True


def _exit_at_once(number: int, frame: Any) -> None:
    if _nothing_is_left and number in SIGNALS:
        return
    sys.stdout.flush()
    if _waits:
        print(f"{signal.Signals(number).name}: this command ends, the jobs stay", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    requeue(number)
    os._exit(INTERRUPTED if number == signal.SIGINT else REQUEUE)  # an exception may be swallowed within an import


def requeue(number: int | None, *, begun: bool = False) -> None:
    """Have SLURM queue this job again, where its time is nearly up (SIGUSR1), or is up (SIGTERM).

    SIGTERM comes too when a job is preempted, which SLURM queues again by itself, and when somebody has cancelled it.
    Under other schedulers the exit code asks for it. One rank asks for all. `begun`: this attempt has trained; those
    that have not are started again `ATTEMPTS` times at most, or a time limit below the start would go round for ever.
    """
    job = os.environ.get("SLURM_JOB_ID")
    ranks = {os.environ.get(name, "0") for name in ("SLURM_PROCID", "LOCAL_RANK")}  # SLURM's tasks, and those of a task
    if number not in SIGNALS or job is None or ranks != {"0"}:
        return
    if number == signal.SIGTERM and "Reason=TimeLimit" not in _slurm("scontrol", "show", "job", job)[0].split():
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    attempts = os.environ.get("SLURM_RESTART_COUNT", "0")
    if not begun and attempts.isdecimal() and int(attempts) >= ATTEMPTS:
        print(
            f"warning: job {job} reached its time limit before it trained, and was started {attempts} times before: it "
            "is not queued again; give it more time (hydra.launcher.timeout_min, #SBATCH --time)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return
    failed = _slurm("scontrol", "requeue", job)[1]
    said = f"warning: SLURM did not queue job {job} again ({failed}): submit it with --requeue, or with resume=<run>"
    print(said if failed else f"SLURM queues job {job} again", file=sys.stderr, flush=True)


def _slurm(*command: str) -> tuple[str, str]:
    """What it prints, and why it failed: empty where it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""


@contextmanager
def preemptible(code: int = REQUEUE) -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the process with `code` where training has not taken them over: nothing is lost. Whoever
    took them, SLURM is asked to queue the job again."""
    try:
        with _handled(code):
            yield
    except SystemExit as ending:
        requeue(getattr(ending, "signal", None), begun=not isinstance(ending, EndedBySignal))
        raise


@contextmanager
def _handled(code: int) -> Iterator[None]:
    global _nothing_is_left
    _nothing_is_left = False

    def leave(number: int, frame: Any) -> None:
        if not _nothing_is_left:
            raise EndedBySignal(code, number)

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
