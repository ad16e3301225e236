"""What a suite finds: a table of intervals, runs side by side, as Markdown, JSON and a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from atlas_lm.evaluation.bootstrap import Interval


@dataclass
class Table:
    """`cells[run][row]`; a cell that a run has not is absent."""

    name: str
    title: str
    unit: str
    axis: str  # what a row is
    form: str = ".4f"
    cells: dict[str, dict[str, Interval]] = field(default_factory=dict)
    places: dict[str, float] = field(default_factory=dict)  # row → where it stands on the picture's axis
    notes: list[str] = field(default_factory=list)

    def add(self, run: str, row: str, value: Interval, place: float | None = None) -> None:
        """One cell; `place`: of its row on a logarithmic axis, where it has one."""
        self.cells.setdefault(run, {})[row] = value
        if place is not None:
            self.places[row] = place

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for cells in self.cells.values() for row in cells))

    def markdown(self) -> str:
        """A table of `mean [low, high]`."""
        lines = [["", *self.cells], ["---"] * (1 + len(self.cells))]
        for row in self.rows:
            lines.append([row, *(self._shown(cells.get(row)) for cells in self.cells.values())])
        table = ["| " + " | ".join(cells) + " |" for cells in lines]
        return "\n".join([f"## {self.title}, {self.unit}", "", *table, *([""] if self.notes else []), *self.notes, ""])

    def _shown(self, value: Interval | None) -> str:
        if value is None or math.isnan(value.mean):
            return "–"
        if value.low == value.high or math.isnan(value.low):
            return f"{value.mean:{self.form}}"
        return f"{value.mean:{self.form}} [{value.low:{self.form}}, {value.high:{self.form}}]"

    def as_json(self) -> dict[str, Any]:
        """All numbers; NaN as null."""

        def plain(value: Interval) -> dict[str, float | None]:
            return {k: (None if math.isnan(v) else v) for k, v in value._asdict().items()}

        runs = {run: {row: plain(value) for row, value in cells.items()} for run, cells in self.cells.items()}
        return {"title": self.title, "unit": self.unit, "axis": self.axis, "runs": runs, "notes": self.notes}

    def draw(self, axes: Any) -> None:
        """Lines with their intervals over the places of the rows; bars where these have none."""
        for n, (run, cells) in enumerate(self.cells.items()):
            known = [(row, value) for row, value in cells.items() if not math.isnan(value.mean)]
            if self.places:
                known = [(row, value) for row, value in known if row in self.places]
                x = [self.places[row] for row, _ in known]
                axes.plot(x, [value.mean for _, value in known], marker="o", markersize=3, label=run)
                axes.fill_between(x, [v.low for _, v in known], [v.high for _, v in known], alpha=0.2)
            else:
                width = 0.8 / len(self.cells)
                x = [self.rows.index(row) + (n - (len(self.cells) - 1) / 2) * width for row, _ in known]
                means = [value.mean for _, value in known]
                errors = [[v.mean - v.low for _, v in known], [v.high - v.mean for _, v in known]]
                axes.bar(x, means, width, yerr=errors, label=run)
        if self.places:
            axes.set_xscale("log", base=2)
            axes.set_xlabel(self.axis)
        else:
            axes.set_xticks(range(len(self.rows)), self.rows, rotation=30, ha="right")
        axes.set(ylabel=self.unit, title=self.title)
        axes.legend(fontsize=8)
