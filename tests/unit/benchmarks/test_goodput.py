"""Where the time of a run with faults went: every second in one part, and each part is red where its cause is there."""

import pytest

from benchmarks.goodput import Parts, Record, Step, parts_of, table


def attempt(first, began, count, seconds=2.0, gap=0.5):
    """Steps one after the other."""
    return [
        Step(first + i, began + i * (seconds + gap), began + i * (seconds + gap) + seconds) for i in range(count)
    ]  # fmt: skip


def test_an_undisturbed_run_is_steps_and_what_lies_between():
    record = Record(0, 35, [attempt(1, 10, 10)], [(4, 35)])
    assert parts_of(record) == Parts(counted=20, between=5, queue=4, restore=6)


def test_a_kill_costs_steps_detection_queue_and_restore():
    first, second = attempt(1, 10, 6), attempt(4, 50, 4)  # steps 4, 5 and 6 are done again
    record = Record(0, 60, [first, second], [(4, 33), (40, 60)], [(25.5, "a process killed")])
    found = parts_of(record)
    # the step that began at 25 was cut after half a second, and half a second lies before it
    assert found == Parts(
        counted=3 * 2 + 4 * 2, between=5 * 0.5 + 3 * 0.5 + 0.5, repeated=3 * 2 + 1.0, detection=7.5, queue=4 + 7,
        restore=6 + 10,
    )  # fmt: skip
    assert found.total() == 60


def test_a_signal_lets_the_step_end_and_repeats_nothing():
    first, second = attempt(1, 10, 6), attempt(7, 50, 4)
    record = Record(0, 60, [first, second], [(4, 26), (30, 60)], [(23, "a signal")])
    found = parts_of(record)
    assert (found.repeated, found.detection) == (0, 1.5)
    assert found.total() == 60


def test_a_fault_that_nobody_notices_lasts_until_the_end():
    record = Record(0, 100, [attempt(1, 10, 6)], [(4, 100)], [(30, "a process stopped")])
    found = parts_of(record)
    assert (found.detection, found.counted) == (70, 12)
    assert found.total() == 100


def test_the_last_step_may_end_after_a_fault_that_nobody_notices():
    """The other rank had done its part of it."""
    record = Record(0, 100, [attempt(1, 10, 6)], [(4, 100)], [(23, "a process stopped")])
    found = parts_of(record)
    assert (found.detection, found.between) == (100 - 24.5, 2.5)
    assert found.total() == 100


def test_a_start_that_comes_to_no_step_is_no_queue():
    record = Record(0, 100, [attempt(1, 10, 6)], [(4, 25), (40, 60), (70, 100)], [(50, "a process stopped")])
    found = parts_of(record)
    assert (found.queue, found.restore, found.detection) == (4 + 15 + 10, 6 + 10 + 30, 0.5 + 10)
    assert found.total() == 100


def test_a_run_without_a_step_has_no_goodput():
    with pytest.raises(ValueError, match="no step"):
        parts_of(Record(0, 10))


def test_the_table_has_the_share():
    assert "**50.0%**" in table({"ours": Parts(counted=30, restore=30)})
