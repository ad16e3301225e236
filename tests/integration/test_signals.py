"""A signal to the whole process group, as a scheduler or `timeout` sends it, loader workers included."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from atlas_lm.data.worker_signals import TO_A_GROUP, outlive_signals, signals_held
from tests.integration.test_resume import OFTEN, assert_same_run
from tests.support import ROOT
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, only_run, report_of, write_corpus

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
    assert not is_there(process.pid), "a worker is left behind"


def is_there(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_while_python_still_imports(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = start(tmp_path, 8)
        wait_until_it_listens(process)
        preempt(process, tmp_path, number)
    assert not (tmp_path / "outputs").exists()


def test_ctrl_c_before_training_is_no_traceback(tmp_path: Path) -> None:
    for seconds in (0.0, 3.0):
        process = start(tmp_path, 8)
        wait_until_it_listens(process)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (130, 1), "1 where training has begun and has saved"
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_in_training(tmp_path: Path) -> None:
    process = start(tmp_path, 1000)
    wait_for_rows(process, tmp_path, 2)
    preempt(process, tmp_path, signal.SIGTERM)
    run = only_run(tmp_path / "outputs")
    assert report_of(run)["status"] == "interrupted"
    assert (run / "checkpoints" / "interrupted.ckpt").is_file()
    assert "DataLoader worker" not in (tmp_path / "output").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_preemptions_at_random_moments(tmp_path: Path, seed: int) -> None:
    r = random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = 150
    assert start(whole, steps).wait(timeout=300) == 0
    moments = [["start", "training", "validation"][i % 3] for i in range(10)]
    for moment in moments:
        before = rows_so_far(cut)
        process = start(cut, steps, "resume=auto")
        wait_until_it_listens(process)
        if moment == "start":
            time.sleep(r.uniform(0, 4))
        elif moment == "training":
            wait_for_rows(process, cut, before + r.randint(1, 8))
            time.sleep(r.uniform(0, 0.05))
        else:
            wait_for_rows(process, cut, -(-(before + 1) // EVERY) * EVERY)
            time.sleep(r.uniform(0, 0.3))
        assert process.poll() is None, "it has ended before it could be preempted"
        preempt(process, cut, r.choice([signal.SIGTERM, signal.SIGUSR1]))
    assert start(cut, steps, "resume=auto").wait(timeout=300) == 0
    assert_same_run(*(only_run(folder / "outputs") for folder in (cut, whole)))


def test_a_worker_outlives_signals_of_others_and_obeys_its_parent() -> None:
    with signals_held():
        worker = multiprocessing.get_context("fork").Process(target=_work)
        worker.start()
    assert worker.pid is not None
    for number in TO_A_GROUP:  # from another process, also before it has begun
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    time.sleep(0.3)
    for number in TO_A_GROUP:
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    time.sleep(0.1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0


def _work() -> None:
    outlive_signals(0)
    time.sleep(60)


def test_held_signals_come_when_they_are_let_go() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with signals_held():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # another thread would take one to the process
            assert seen == []
        assert seen == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
