"""train.py as a process with loader workers, and signals to its whole process group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import ROOT
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, write_corpus
from tests.support.resuming import OFTEN

TRAIN = ROOT / "train.py"
EVERY = 6  # steps between validations


def start(folder: Path, steps: int, *overrides: str) -> subprocess.Popen[bytes]:
    """A run with two loader workers, in a process group of its own."""
    folder.mkdir(exist_ok=True)
    corpus = write_corpus(folder / "corpus")
    words = [sys.executable, str(TRAIN), "data=text", corpus, *SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, *OFTEN, "name=cut",
             "data.num_workers=2", f"optim.total_steps={steps}", f"trainer.val_check_interval={EVERY}"]  # fmt: skip
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            [*words, *overrides], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=output, stderr=output,
        )  # fmt: skip


def rows_so_far(folder: Path) -> int:
    found = list(folder.glob("outputs/cut/2*/metrics.jsonl"))
    return len(found[0].read_bytes().splitlines()) if found else 0


def wait_until_it_listens(process: subprocess.Popen[bytes]) -> None:
    """Until then Python itself is starting, and no code of ours can catch anything."""
    while not listens(process.pid):
        assert process.poll() is None
        time.sleep(0.002)


def listens(pid: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


def wait_for_rows(process: subprocess.Popen[bytes], folder: Path, rows: int) -> None:
    until = time.monotonic() + 120
    while rows_so_far(folder) < rows and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def preempt(process: subprocess.Popen[bytes], folder: Path, number: int) -> None:
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 75, (folder / "output").read_text()[-3000:]
    until = time.monotonic() + 10
    while is_there(process.pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_there(process.pid), "a worker is left after"


def is_there(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
