"""Fields of settings that know what they may hold."""

import math
from dataclasses import field, fields
from typing import Any

from atlas_lm.config.names import nearest

MISSING: Any = "???"  # what conf/ or the user has to give; OmegaConf's mark for it
FLOAT32 = 3.4e38
LARGEST = 2**31 - 1  # of whole numbers: the size of a matrix of two of them still fits 64 bits


def choice(*names: str, default: str | None = MISSING) -> Any:
    """A field that takes one of these names."""
    return field(default=default, metadata={"choices": names})


def number(default: Any = MISSING, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field that takes a number in [minimum, maximum]; NaN is in no range."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def check_values(config: Any, section: str) -> None:
    """ValueError for the first field outside its choices or its range; values that are still `???` pass."""
    for f in fields(config):
        value, where = getattr(config, f.name), f"{section}{f.name}"
        if value is None or (isinstance(value, str) and value == MISSING):
            continue
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{where}={value} must be one of {', '.join(choices)}{nearest(value, choices)}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{where}={value} must be at most {LARGEST}: lower it")
        if isinstance(value, float) and FLOAT32 < abs(value) < math.inf:
            raise ValueError(f"{where}={value} is beyond {FLOAT32:g}, the largest number of float32: lower it")
        low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
        if low is not None and not value >= low:
            raise ValueError(f"{where}={value} must be at least {low:g}: raise it")
        if high is not None and not value <= high:
            raise ValueError(f"{where}={value} must be at most {high:g}: lower it")
