"""How a safeguard that cannot go back by itself asks for it, and says when no state may be kept."""

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer


@runtime_checkable
class CanRollBack(Protocol):
    """A callback that returns to an earlier state at the end of this step, on all ranks, when asked for it."""

    def request_rollback(self, reason: str) -> None:
        """To be called on all ranks; `reason` is for the log."""
        ...


def who_can_roll_back(trainer: Trainer) -> CanRollBack | None:
    """The first such callback."""
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, CanRollBack)), None)


def blocks_snapshot(trainer: Trainer) -> bool:
    """Whether a callback says, by a true attribute `blocks_snapshot`, that this is no moment to come back to."""
    return any(getattr(callback, "blocks_snapshot", False) for callback in _callbacks(trainer))


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]
