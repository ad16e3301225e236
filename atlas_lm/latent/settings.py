"""The settings of next-vector prediction beside those of the model and the optimizer, typed and checked."""

from dataclasses import dataclass

from atlas_lm.config.fields import check_values, choice, number
from atlas_lm.latent.losses import MEANS
from atlas_lm.latent.model import HEADS, TRUNKS


@dataclass
class LatentConfig:
    """What `conf/module/latent.yaml` sets. ValueError for a value outside its choices or range."""

    trunk: str = choice(*TRUNKS, default="blocks")
    """blocks: those of `model`, with a memory or without; gru: as wide and as deep."""
    head: str = choice(*HEADS, default="direct")
    """residual: y = normalize(u + α · Δ), a step from the last frame u; α is learned from 0.5."""
    mse: str = choice(*MEANS, default="mean")
    """The squared error's mean over the D dimensions of a frame, as the seed has it, or their sum."""
    step_penalty: float = number(1e-4, minimum=0)
    """Weight of mean Δ² of the residual head, Δ in units of a frame's dimensions of about 1."""
    contrast: float = number(0.0, minimum=0)
    """Weight of InfoNCE beside the squared error, as a part of the main loss; 0: none."""
    temperature: float = number(0.1, minimum=1e-3)
    """Of InfoNCE: cosines are divided by it."""
    guard_cap: float | None = number(0.1, minimum=0)
    """Largest gradient norm of all guards together, as a fraction of the main loss's; null: measured, not held."""
    margin_future: float = number(0.01, minimum=0)
    """Cosine by which the target must be nearer than each of the two frames after it."""
    margin_direction: float = number(0.01, minimum=0)
    """Cosine by which it must be nearer than the last frame seen."""
    margin_anticopy: float = number(0.01, minimum=0)
    """Cosine by which it must be nearer than each frame of the context."""

    def __post_init__(self) -> None:
        check_values(self, "module.")

    @property
    def margins(self) -> dict[str, float]:
        """By guard."""
        return {
            "future": self.margin_future, "direction": self.margin_direction, "anticopy": self.margin_anticopy,
        }  # fmt: skip
