"""Products of parameters of which the fast suite runs a part: every two values of two parameters meet in it."""

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def every_pair(*, slow: Callable[..., bool] | None = None, **values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with the product of `values`; the rows that no pair needs are marked slow.

    `slow(**row)` names rows that the fast suite does without in any case. A parameter `path` goes to the fixture of
    that name.
    """
    columns = list(values.values())
    indices = list(product(*(range(len(column)) for column in columns)))
    rows = [tuple(column[i] for column, i in zip(columns, index, strict=True)) for index in indices]
    quick = [n for n, row in enumerate(rows) if slow is None or not slow(**dict(zip(values, row, strict=True)))]
    fast = {quick[n] for n in covering([indices[n] for n in quick])}
    marked = [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if n in fast else pytest.mark.slow)
        for n, row in enumerate(rows)
    ]
    return pytest.mark.parametrize(tuple(values), marked, indirect=[name for name in values if name == "path"])


def covering(rows: Sequence[tuple[int, ...]]) -> list[int]:
    """Which of `rows` together contain every pair of values in two columns that any of them contains.

    Greedy: the row with the most pairs that are still missing, the first of several.
    """
    pairs = [set(combinations(enumerate(row), 2)) for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda n: len(missing & pairs[n]))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
