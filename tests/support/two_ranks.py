"""Runs functions on two gloo ranks of this machine, all in one pair of processes.

As a script this is one of the ranks: `python -m tests.support.two_ranks <module:function> …`.
"""

import importlib
import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.forking import Forked, start

FOLDER = "TWO_RANKS_FOLDER"
TAIL = 3000  # characters of a rank's stderr that a failure shows


def shared_folder() -> Path:
    """A folder of this launch that both ranks see; for scenarios."""
    return Path(os.environ[FOLDER])


def run_on_two_ranks(*scenarios: Callable[[], Any], timeout: float = 180) -> list[list[Any]]:
    """results[i][rank]: what `scenarios[i]()` returned there, or ("raised", name of the exception's type, its message).

    A scenario is a function at the top of a test module and returns something picklable; it may train with as many
    Trainers(strategy="ddp", accelerator="cpu", devices=2) as it likes. Fails the test if a rank dies, or after
    `timeout` seconds, with the end of what the ranks wrote to stderr.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = start_two_ranks(folder, *scenarios)
        ended = _wait(ranks, timeout)
        if ended != [0, 0]:
            said = [(folder / f"stderr{rank}").read_text(errors="replace")[-TAIL:] for rank in range(2)]
            pytest.fail(f"ranks ended with {ended}\n\nrank 0:\n{said[0]}\n\nrank 1:\n{said[1]}", pytrace=False)
        results = [pickle.loads((folder / f"results{rank}").read_bytes()) for rank in range(2)]
    return [list(both) for both in zip(*results, strict=True)]


def start_two_ranks(folder: Path, *scenarios: Callable[[], Any]) -> list[Forked]:
    """The processes of both ranks, which have just begun; `folder` is the one that they share."""
    names = [f"{scenario.__module__}:{scenario.__qualname__}" for scenario in scenarios]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, FOLDER: str(folder), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ranks = []
    for rank in range(2):
        env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start("tests.support.two_ranks", *names, env=env, stderr=folder / f"stderr{rank}"))
    return ranks


def _wait(ranks: list[Forked], timeout: float) -> list[int | str]:
    """Exit codes; a rank whose partner has died, or that takes too long, is killed."""
    until = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > until or any(rank.returncode for rank in ranks):
                break
            time.sleep(0.05)
        return ["still running" if rank.poll() is None else rank.returncode for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()


def _result_of(name: str) -> Any:
    """What the scenario `module:function` returns."""
    module, _, function = name.partition(":")
    scenario = getattr(importlib.import_module(module), function)
    print(f"--- {name}", file=sys.stderr, flush=True)  # where a rank hangs
    try:
        return scenario()
    except Exception as error:
        return "raised", type(error).__name__, str(error)


if __name__ == "__main__":
    found = [_result_of(name) for name in sys.argv[1:]]
    (shared_folder() / f"results{os.environ['RANK']}").write_bytes(pickle.dumps(found))
