"""Ranges of a safeguard's settings, and the error that names the value, the safeguard and the range."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """`holds(value)`: whether it lies inside. `rule`: what it must be, after "must"."""

    holds: Callable[[Any], bool]
    rule: str


def _with(rule: str, why: str) -> str:
    return f"{rule}, {why}" if why else rule


def at_least(least: float, why: str = "") -> Range:
    """`why`: what the reader may want to know of the limit; so in the others."""
    return Range(lambda value: least <= value < math.inf, _with(f"be at least {least}", why))


def above(least: float, why: str = "") -> Range:
    return Range(lambda value: least < value < math.inf, _with(f"be above {least}", why))


def between(least: float, most: float, why: str = "") -> Range:
    return Range(lambda value: least <= value <= most, _with(f"lie in [{least}, {most}]", why))


def share(why: str = "") -> Range:
    return Range(lambda value: 0 < value <= 1, _with("lie in (0, 1]", why))


def one_of(*choices: str) -> Range:
    return Range(lambda value: value in choices, f"be {', '.join(choices[:-1])} or {choices[-1]}")


def check(owner: str, **settings: tuple[Any, Range]) -> None:
    """ValueError for the first setting of the safeguard `owner` that lies outside its range; NaN lies outside all."""
    for name, (value, allowed) in settings.items():
        if not allowed.holds(value):
            raise ValueError(f"{name}={value} of {owner} must {allowed.rule}")
