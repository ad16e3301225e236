"""Processes that begin where imports end: importing torch and Lightning takes seconds, forking takes none.

As a script this is a process that imports them, uses nothing of them, and forks once per request. The copy runs a
module as `python -m <module> <arguments>` does, to the ordinary end of an interpreter.
"""

import atexit
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import ROOT


class Forked:
    """A process; as much of subprocess.Popen as tests need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"wait": self.pid})
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


def start(module: str, *arguments: str, env: Mapping[str, str], stderr: Path) -> Forked:
    """`python -m module arguments` in the working directory; what it prints goes nowhere, its stderr into a file."""
    return Forked(_ask({"argv": [module, *arguments], "env": dict(env), "stderr": str(stderr), "cwd": str(Path.cwd())}))


_lock = threading.Lock()
_server: list[subprocess.Popen[str]] = []


def _ask(request: dict[str, Any]) -> Any:
    with _lock:
        if not _server:
            command = [sys.executable, "-m", "tests.support.forking"]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            _server.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            atexit.register(_stop)
        stdin, stdout = _server[0].stdin, _server[0].stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())


def _stop() -> None:
    with _server.pop() as server:
        assert server.stdin is not None
        server.stdin.close()


def serve() -> dict[str, Any] | None:
    """In a copy, the request that it is for; in the server, None once nobody asks any more."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Run the module of a request in this process."""
    import numpy as np
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    for stream, path, flags in (
        (0, os.devnull, os.O_RDONLY), (1, os.devnull, os.O_WRONLY), (2, request["stderr"], os.O_WRONLY | os.O_CREAT),
    ):  # fmt: skip
        file = os.open(path, flags)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    random.seed()
    np.random.seed()  # noqa: NPY002
    rank_zero_only.rank = int(os.environ["RANK"])  # Lightning reads it when it is imported
    sys.argv = request["argv"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import tests.support.rollback_cases  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a copy of a process with threads has locks that nobody opens"
    asked = serve()
    if asked is not None:
        become(asked)
