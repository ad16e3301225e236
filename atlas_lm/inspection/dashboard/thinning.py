"""Fewer points where a screen has no room for more: long generations and long runs. No peak is lost in a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

POINTS = 400  # of a line
COLUMNS = 150  # of a heat map


def thin_lines(rows: Sequence[Row], y: str, by: str, most: int = POINTS) -> list[Row]:
    """At most `most` points of each line, in their order: the smallest and the largest of each stretch of it."""
    lines: dict[Any, list[Row]] = {}
    for row in rows:
        if row[y] is not None:
            lines.setdefault(row[by], []).append(row)
    found: list[Row] = []
    for line in lines.values():
        size = math.ceil(2 * len(line) / most) if len(line) > most else 1
        for start in range(0, len(line), size):
            stretch = line[start : start + size]
            ends = {
                stretch.index(min(stretch, key=lambda row: row[y])),
                stretch.index(max(stretch, key=lambda r: r[y])),
            }
            found += [stretch[i] for i in sorted(ends)]
    return found


def thin_heat(rows: Sequence[Row], x: str, y: str, most: int = COLUMNS) -> list[Row]:
    """At most `most` columns: each the mean over as many neighbours, under the first one's name. None is left out."""
    columns = list(dict.fromkeys(row[x] for row in rows))
    size = math.ceil(len(columns) / most)
    if size <= 1:
        return list(rows)
    first = {name: columns[i - i % size] for i, name in enumerate(columns)}
    cells: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        cell = cells.setdefault((first[row[x]], row[y]), [])
        if row["value"] is not None:
            cell.append(row["value"])
    return [
        {x: column, y: line, "value": math.fsum(values) / len(values) if values else None}
        for (column, line), values in cells.items()
    ]
