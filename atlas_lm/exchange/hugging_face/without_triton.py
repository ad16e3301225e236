"""In place of the Triton kernels, which an exported model leaves out: atlas-lm itself has them."""

from typing import Any


def can_run(config: Any, x: Any) -> bool:
    """Never."""
    return False


def variant(config: Any, x: Any) -> tuple[Any, ...]:
    """There is none."""
    raise NotImplementedError("an exported model has no Triton kernels: pip install atlas-lm")


def run(config: Any, states: Any, x: Any) -> Any:
    """There is none."""
    raise NotImplementedError("an exported model has no Triton kernels: pip install atlas-lm")
