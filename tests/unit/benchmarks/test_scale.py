"""scale: communication by hand, at sizes where it is easy."""

import pytest

from atlas_lm.training.budget import Budget
from benchmarks import scale


def test_one_machine_uses_its_own_links() -> None:
    assert scale.all_reduce(1e9, 1) == 0
    assert scale.all_reduce(1e9, 8) == pytest.approx(2 * 7 / 8 / 360)
    assert scale.gather(1e9, 8) == pytest.approx(7 / 8 / 360)


def test_between_machines_all_ports_carry_a_part() -> None:
    assert scale.all_reduce(1e9, 16) == pytest.approx(2 * 7 / 8 / 360 + 2 / 8 / 2 / 40)
    assert scale.gather(8e9, 512) == pytest.approx(max(8 * 7 / 8 / 360, 8 * 63 / 64 / 320))


def test_what_fits_beside_computing_is_not_waited_for() -> None:
    found = scale.Row(0.3, 0.9, 0, 0)
    assert scale.waits(1.0, found) == (0.0, 0.0)
    assert scale.waits(0.3, found) == (pytest.approx(0.1), pytest.approx(0.6))


def test_sharding_divides_what_lasts() -> None:
    size = scale.Size("x", 250, 2, Budget(1000, 1000, 2000, 500, 0, 5000))
    assert scale.row(size, 8)[2:] == (5000.0, 5000 - 4000 * 7 / 8)


def test_the_measured_card_is_read() -> None:
    found = scale.measured()
    assert 0.01 < found.seconds_of_block < 1
    assert 1e13 < found.operations < 1e15
