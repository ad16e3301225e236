"""What a gate says of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GateResult:
    """One measurement and the judgement on it. What cannot be measured is raised instead, and fails the gate."""

    passed: bool
    measured: float | str | None
    detail: str
    """For the table, in parentheses: what was measured, or what is wrong."""


@dataclass(frozen=True)
class Gate:
    """One line of the table and one entry of exit_gates.json."""

    id: str
    name: str
    passed: bool
    measured: float | str | None
    threshold: str
    detail: str

    def as_json(self) -> dict[str, object]:
        """JSON has no NaN."""
        values = dict(vars(self))
        if isinstance(self.measured, float) and not math.isfinite(self.measured):
            values["measured"] = str(self.measured)
        return values
