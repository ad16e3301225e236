"""What every module that is trained here has: the outer optimizer, clipping by a norm that is known, loss weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from atlas_lm.config.model import ModelConfig
from atlas_lm.config.schema import OptimConfig
from atlas_lm.training.flat_storage import lay_side_by_side
from atlas_lm.training.optimizer import apply_settings, build_optimizer, build_schedule


class OptimizedModule(L.LightningModule):
    """Optimizes `self.model` by `self.optim_config`. A subclass sets both, and names its auxiliary losses."""

    model: nn.Module
    optim_config: OptimConfig

    def __init__(self) -> None:
        super().__init__()
        # cached norm: (id, version) of each gradient, the norm, the gradients; held, so that no other gets their ids
        self._known_norm: tuple[list[tuple[int, int]], Tensor, list[Tensor]] | None = None
        self.loss_weights: dict[str, float] = {}

    def set_loss_weight(self, name: str, weight: float) -> None:
        """Weight of an auxiliary loss from the next step on. KeyError: none of that name."""
        if name not in self.loss_weights:
            raise KeyError(f"there is no auxiliary loss {name!r}; there are {', '.join(self.loss_weights)}")
        self.loss_weights[name] = weight

    def gradient_norm(self) -> Tensor:
        """2-norm of this step's gradients before clipping, over all shards; computed when first asked for."""
        norm = self._norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _norm(self) -> Tensor:
        gradients = [p.grad for p in self._optimized() if p.grad is not None]
        now = [(id(gradient), gradient._version) for gradient in gradients]  # a callback may drop or change some
        if self._known_norm is None or self._known_norm[0] != now:
            self._known_norm = now, torch.nn.utils.get_total_norm(gradients), gradients
        return self._known_norm[1]

    def _optimized(self) -> list[Tensor]:
        """In the order in which Lightning clips them."""
        return [p for group in self.trainer.optimizers[0].param_groups for p in group["params"]]

    def on_after_backward(self) -> None:
        self._known_norm = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if any(p.grad is not None for p in self._optimized()):  # a guard may have taken them away: the step is skipped
            self.log("optim/grad_norm", self.gradient_norm())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning clips by norm, with the norm that is known already."""
        plugin = type(self.trainer.precision_plugin)
        plain = plugin.clip_grad_by_norm is Precision.clip_grad_by_norm
        plain &= plugin.clip_gradients in (Precision.clip_gradients, MixedPrecision.clip_gradients)
        if plain and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(self._optimized(), gradient_clip_val, self._norm())
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._known_norm = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run trains with the optimizer's settings that it is given, not with those of its checkpoint."""
        if "optimizer_states" not in checkpoint:  # of a rollback, which restores settings of this run
            return
        apply_settings(checkpoint, build_optimizer(self.model, self.optim_config), self.optim_config)
        if self._trainer is not None and not self.trainer.strategy.lightning_restore_optimizer:
            # a strategy that shards parameters has loaded the optimizer by itself, before this hook
            for optimizer, state in zip(self.trainer.optimizers, checkpoint["optimizer_states"], strict=True):
                for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                    group.update({name: value for name, value in saved.items() if name != "params"})

    def configure_optimizers(self) -> Any:
        lay_side_by_side(self.model)  # again, on the device where it has arrived
        optimizer = build_optimizer(self.model, self.optim_config)
        schedule = build_schedule(optimizer, self.optim_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def plain(config: ModelConfig | OptimConfig) -> dict[str, Any]:
    """Its fields in containers that a checkpoint can be read with."""
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in vars(config).items()}
