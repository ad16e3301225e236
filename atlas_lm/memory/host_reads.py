"""Whether the host may look at values, and how a GPU's way is taken on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_simulated = False


def may_look(x: Tensor) -> bool:
    """Whether a value of this tensor can be asked for: of one on a GPU the answer would wait for all that is queued."""
    return x.is_cpu and not _simulated


def simulated() -> bool:
    """Whether tensors of the CPU stand for a GPU's."""
    return _simulated


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Tensors of the CPU go the way of a GPU: nothing looks at them, and no code that was compiled for a CPU runs.

    The GPU's own kernels are not launched, so that what they would write stays as it was: for counting operations and
    bytes, with values that mean nothing.
    """
    global _simulated
    before, _simulated = _simulated, True
    try:
        yield
    finally:
        _simulated = before
