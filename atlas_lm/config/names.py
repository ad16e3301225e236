"""Names that were meant: the nearest valid one of a misspelled one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest valid name, "" when none is close. Two letters that have changed places
    are the likelier slip: modle is model, though module is as near."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=3, cutoff=0.5)
    swapped = [found for found in close if sorted(found) == sorted(str(name))]
    return f" (did you mean {[*swapped, *close][0]!r}?)" if close else ""
