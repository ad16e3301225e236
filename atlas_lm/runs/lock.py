"""One process per run folder: the kernel's lock, or a file where the filesystem has none."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from atlas_lm.runs.job import current_job, still_known

log = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".owner"
# Lustre without `-o flock`, and some network and user-space filesystems
WITHOUT_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder for this process; the kernel lets it go, however the process ends.

    Where the filesystem knows no locks, a file says who holds it, and outlives a killed process: then one of this
    machine, of a job that is gone, or of this job's attempt before is recognised as ended; else the file has to be
    removed by hand.

    ValueError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("w") as file:
        try:
            _take(file)
        except BlockingIOError:
            raise ValueError(
                f"{str(run)!r} is being written to by another process: wait until it ends, or stop it, then resume"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            log.warning("%s lies on a filesystem without locks (%s): a file .owner stands for one", run, error.strerror)
            with _owned(run / OWNER):
                yield
            return
        yield


def _take(file: IO[str]) -> None:
    """BlockingIOError: another process holds it, and not only for the moment in which `is_held` looks."""
    for attempt in range(5):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == 4:
                raise
            time.sleep(0.05)


def is_held(run: Path) -> bool:
    """Whether a process writes to this run folder; nothing is changed there."""
    owner = run / OWNER
    try:
        with (run / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a filesystem without any
        pass
    return owner.exists() and not _has_ended(_read(owner))


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether a process is known to have ended: of another machine by its job alone."""
    pid, job = owner.get("pid"), owner.get("job")
    if owner.get("host") == socket.gethostname():
        return isinstance(pid, int) and owner.get("birth") != _birth(pid)
    if not isinstance(job, str):
        return False
    if job == current_job():  # no scheduler starts a job again before all of it has ended
        return owner.get("attempt") != _attempt()
    return still_known(job) is False


def _attempt() -> str:
    """How often SLURM has started this job again."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _birth(pid: int) -> str:
    """What tells this process from every other of this machine; empty where there is none of that number."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {started}"
    except OSError:
        return ""


@contextmanager
def _owned(path: Path) -> Iterator[None]:
    """Hold `path`, which names this process, until it ends."""
    mine = {
        "host": socket.gethostname(), "pid": os.getpid(), "birth": _birth(os.getpid()), "job": current_job(),
        "attempt": _attempt(),
    }  # fmt: skip
    for _ in range(2):
        try:
            with path.open("x") as file:
                json.dump(mine, file)
            break
        except FileExistsError:
            owner = _read(path)
            where = f"process {owner.get('pid')} on {owner.get('host')}"
            if not _has_ended(owner):
                raise ValueError(
                    f"{str(path.parent)!r} is being written to by {where}: wait until it ends, or stop it, then "
                    f"resume; if it has ended, remove {str(path)!r}"
                ) from None
            log.warning("%s has ended without removing %s", where, path)
            path.unlink(missing_ok=True)
    else:
        raise ValueError(f"{str(path.parent)!r} is being written to by another process: wait until it ends")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """{} for a file that was not written to its end."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
