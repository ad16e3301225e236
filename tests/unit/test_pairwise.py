"""What the fast suite runs of a product contains every pair of values."""

from itertools import combinations, product

from tests.support.pairwise import covering, every_pair


def pairs(rows: list[tuple[int, ...]]) -> set[object]:
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


def test_every_pair_is_in_a_part_of_the_product() -> None:
    rows = list(product(range(4), range(7), range(3), range(2), range(2)))
    chosen = [rows[n] for n in covering(rows)]
    assert pairs(chosen) == pairs(rows)
    assert 4 * 7 <= len(chosen) <= 30


def test_the_product_is_whole_and_the_rest_of_it_is_slow() -> None:
    mark = every_pair(a=[1, 2], b=["x", "y"], c=[None, 0.5, 3], slow=lambda a, c, **_: (a, c) == (1, 3)).mark
    names, rows = mark.args
    assert names == ("a", "b", "c")
    assert [row.values for row in rows] == list(product([1, 2], ["x", "y"], [None, 0.5, 3]))
    fast = [row.values for row in rows if not row.marks]
    assert {(a, b) for a, b, _ in fast} == {*product([1, 2], ["x", "y"])}
    assert {(a, c) for a, _, c in fast} == {*product([1, 2], [None, 0.5, 3])} - {(1, 3)}
