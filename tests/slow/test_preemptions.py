"""Runs of processes that are preempted again and again: the last one is the uninterrupted one."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.support.launching import only_run
from tests.support.preempting import EVERY, preempt, rows_so_far, start, wait_for_rows, wait_until_it_listens
from tests.support.resuming import assert_same_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_preemptions_at_random_moments(tmp_path: Path, seed: int) -> None:
    r = random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = 190  # more than ten starts can train before their signals come
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
