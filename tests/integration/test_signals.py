"""A signal to the whole process group, as a scheduler or `timeout` sends it, loader workers included."""

import multiprocessing
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from atlas_lm.data.worker_signals import TO_A_GROUP, outlive_signals, signals_held
from tests.support.launching import only_run, report_of
from tests.support.preempting import preempt, start, wait_for_rows, wait_until_it_listens


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


@pytest.mark.long
def test_in_training(tmp_path: Path) -> None:
    process = start(tmp_path, 1000)
    wait_for_rows(process, tmp_path, 2)
    preempt(process, tmp_path, signal.SIGTERM)
    run = only_run(tmp_path / "outputs")
    assert report_of(run)["status"] == "interrupted"
    assert (run / "checkpoints" / "interrupted.ckpt").is_file()
    assert "DataLoader worker" not in (tmp_path / "output").read_text()


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
