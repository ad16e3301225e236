"""Connections and processes of the ranks: which are there, and how to cut them."""

import gc
import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from callbacks.support.collectives import ProcessGroupGone

log = logging.getLogger(__name__)


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


def port_of(store: Any) -> int | None:
    """That of a TCPStore, under whatever prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "port", None)


def is_of_connection(exception: BaseException) -> bool:
    """Whether it comes from a collective; gloo has no type of its own."""
    known = (dist.DistError, ProcessGroupGone)
    return isinstance(exception, known) or (isinstance(exception, RuntimeError) and "gloo" in str(exception))


def end_collectives(spared_port: int | None) -> None:
    """Have the collective fail in which this rank waits.

    NCCL's are aborted, and nothing is cut: its watchdog would end this process at a broken connection, before the
    verdict is reported. Gloo has no abort.
    """
    if dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
        dist.distributed_c10d._abort_process_group()
    else:
        cut_connections(spared_port)


# NCCL's watchdog ends a process whose collective fails, and its monitor one whose watchdog is slow: before a verdict
# can be reported. Both are read when the process group is made.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def let_nccl_fail_softly() -> None:
    """Leave the end of a hanging run to `hang_watch`, where the user has not decided otherwise."""
    for name, value in NCCL_SETTINGS.items():
        if os.environ.setdefault(name, value) != value:
            log.warning("%s=%s: NCCL may end the process before hang_watch can say why", name, os.environ[name])
