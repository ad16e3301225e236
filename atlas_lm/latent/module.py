"""The LightningModule of next-vector prediction: main loss, guards under their cap, validation, what callbacks ask."""

# B batch, T positions, D dimensions, N scored predictions, K offsets, F frames of a document

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torchmetrics import MeanMetric

from atlas_lm.config.model import ModelConfig
from atlas_lm.config.schema import OptimConfig
from atlas_lm.latent import baselines
from atlas_lm.latent.baselines import Predictor, WindowPredictor
from atlas_lm.latent.five_cat import Measured, Sets, centre_of, measure
from atlas_lm.latent.losses import (
    GUARDS,
    capped_scale,
    contrast_loss,
    cosines_at,
    gradient_norms,
    guard_losses,
    main_loss,
)
from atlas_lm.latent.model import LatentModel, Predicted
from atlas_lm.latent.settings import LatentConfig
from atlas_lm.latent.source import BEFORE, EmbeddingSource
from atlas_lm.training.flat_storage import lay_side_by_side
from atlas_lm.training.optimized import OptimizedModule, plain

Batch = dict[str, Tensor]
COLLAPSE = 0.02  # of the data's effective rank, that predictions have at most when they are one point or a few


class LatentModule(OptimizedModule):
    """Trains a LatentModel on batches of `frames`, `valid` and `scored`, see `source.py`.

    `dim`, `embedder`, `context`, `history` (frames of a run) come from the data; the rest is `LatentConfig`.
    """

    model: LatentModel
    centre: Tensor

    def __init__(
        self,
        model: ModelConfig | dict[str, Any],
        optim: OptimConfig | dict[str, Any],
        dim: int,
        embedder: str,
        context: int,
        history: int,
        trunk: str = "blocks",
        head: str = "direct",
        mse: str = "mean",
        step_penalty: float = 1e-4,
        contrast: float = 0.0,
        temperature: float = 0.1,
        guard_cap: float | None = 0.1,
        margin_future: float = 0.01,
        margin_direction: float = 0.01,
        margin_anticopy: float = 0.01,
    ) -> None:
        super().__init__()
        model = ModelConfig(**model) if isinstance(model, dict) else model
        optim = OptimConfig(**optim) if isinstance(optim, dict) else optim
        settings = LatentConfig(
            trunk, head, mse, step_penalty, contrast, temperature, guard_cap, margin_future, margin_direction,
            margin_anticopy,
        )  # fmt: skip
        # plain containers: a checkpoint must load with weights_only=True
        of_data = {"dim": dim, "embedder": embedder, "context": context, "history": history}
        self.save_hyperparameters({"model": plain(model), "optim": plain(optim), **of_data, **vars(settings)})
        self.model_config, self.optim_config, self.settings = model, optim, settings
        self.context, self.history, self.embedder = context, history, embedder
        self.model = LatentModel(model, dim, trunk, head)
        lay_side_by_side(self.model)
        self.register_buffer("centre", torch.zeros(dim))  # the mean of the training frames
        self.loss_weights = dict.fromkeys(GUARDS, 0.0)  # until a schedule sets them
        # torchmetrics drops NaN by default: a validation that is partly NaN would look healthy
        self.val_cosine = MeanMetric(nan_strategy="disable")
        self._references: Measured | None = None  # of the last frame, on the validation documents

    def setup(self, stage: str) -> None:
        """Take the centre of the training frames from the data. ValueError: a strategy that shards parameters."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("trainer=fsdp shards models that a card cannot hold, and these are small: use trainer=ddp")
        source = self._source()
        if source is not None:
            self.centre.copy_(torch.cat(source.documents("train")).mean(0))

    def _source(self) -> EmbeddingSource | None:
        source = getattr(getattr(self.trainer, "datamodule", None), "source", None)
        return source if isinstance(source, EmbeddingSource) else None

    # What callbacks ask for

    def held_out_loss(self, batch: Batch) -> Tensor:
        """Mean 1 − cos of a batch: the squared error's mean over dimensions would move by 0.1 % in a collapse."""
        return 1 - self._target_cosines(self(batch).y, batch).mean()

    def offset_cosines(self, batch: Batch, offsets: Sequence[int]) -> Tensor:
        """(N, K): cosine of each scored prediction with the frame at each offset, +1 the target; NaN: there is none."""
        found = cosines_at(self(batch).y, batch["frames"], batch["valid"], offsets, BEFORE)
        return found[:, batch["scored"]].T

    # Training

    def forward(self, batch: Batch) -> Predicted:
        T = batch["scored"].size(1)
        return self.model(batch["frames"][:, BEFORE : BEFORE + T])

    def _target_cosines(self, y_BTD: Tensor, batch: Batch) -> Tensor:
        """(N,): of the scored positions."""
        return cosines_at(y_BTD, batch["frames"], batch["valid"], [1], BEFORE)[0][batch["scored"]]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        predicted = self(batch)
        offsets = [1, 2, 3, *range(-self.context + 1, 1)]
        cosines = cosines_at(predicted.y, batch["frames"], batch["valid"], offsets, BEFORE)[:, batch["scored"]]
        of = dict(zip(offsets, cosines, strict=True))
        loss = self._main(predicted, of[1], batch)
        if any(self.loss_weights.values()):
            guards = guard_losses(of, self.settings.margins, self.context)
            weighted = torch.stack([self.loss_weights[name] * guards[name] for name in GUARDS])
            loss = self._with_guards(loss, weighted.sum())
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/cosine", of[1].detach().mean(), prog_bar=True)
        if self.model.alpha is not None:
            self.log("latent/alpha", self.model.alpha.detach())
        self.log("optim/lr", torch.tensor(float(self.trainer.optimizers[0].param_groups[0]["lr"])))
        self.log("train/global_step", torch.tensor(float(self.trainer.global_step)))  # goes back at a rollback
        return loss

    def _main(self, predicted: Predicted, cosine_N: Tensor, batch: Batch) -> Tensor:
        s = self.settings
        loss = main_loss(cosine_N, self.model.dim, s.mse)
        if predicted.delta is not None and s.step_penalty:
            delta = predicted.delta[batch["scored"]]
            loss = loss + s.step_penalty * delta.square().mean()
        if s.contrast:
            loss = loss + s.contrast * contrast_loss(
                predicted.y, batch["frames"], batch["valid"], batch["scored"], BEFORE, self.context, s.temperature,
                self.centre,
            )  # fmt: skip
        return loss

    def _with_guards(self, main: Tensor, guards: Tensor) -> Tensor:
        """The main loss by value, with the guards' gradient beside its own: no more than the cap's share of it.

        The value stays that of the main loss: guards that set in would look like an outlier.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        main_norm, guard_norm = gradient_norms([main, guards], parameters)
        scale = capped_scale(main_norm, guard_norm, self.settings.guard_cap).detach()
        self.log("latent/guard_ratio", (guard_norm / main_norm.clamp_min(1e-30)).detach())
        self.log("latent/guard_scale", scale)
        pull = scale * guards
        return main + (pull - pull.detach())

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # one by one: with nan_strategy="disable" torchmetrics takes all weights for 1
        self.val_cosine.update(self._target_cosines(self(batch).y, batch))

    def on_validation_epoch_end(self) -> None:
        cosine = self.val_cosine.compute()
        self.val_cosine.reset()
        self.log("val/loss", 1 - cosine, prog_bar=True, sync_dist=True)
        self.log("val/cosine", cosine, prog_bar=True, sync_dist=True)
        source = self._source()
        if source is None or self.trainer.sanity_checking:
            return
        sets = Sets(source.documents("validation"), self.centre.cpu(), self.context)
        predictor, training = self.predictor(), source.documents("train")
        found = measure(predictor, sets, centre_of(predictor, training, self.context), whole=False)
        if self._references is None:
            last = baselines.last_frame(self.context)
            self._references = measure(last, sets, centre_of(last, training, self.context), whole=False)
        for prefix, of in (("val", found), ("last_frame", self._references)):
            values = {
                "contrastive_accuracy": of.mean("accuracy"), "recall_at_1": of.mean("recall_at_1"),
                "recall_at_5": of.mean("recall_at_5"), "effective_rank": of.effective_rank / of.data_rank,
                "spread": of.spread,
            }  # fmt: skip
            if prefix == "last_frame":
                values["cosine"] = of.mean("cosine")
            for name, value in values.items():
                self.log(f"{prefix}/{name}", torch.tensor(value), sync_dist=True)

    def predictor(self) -> Predictor:
        """This model as the tests take one."""
        return _Trained(self)

    def report_values(self, found: dict[str, float]) -> dict[str, Any]:
        """What the report says of the last validation, `quality` in words."""
        names = ("cosine", "contrastive_accuracy", "recall_at_1", "recall_at_5", "effective_rank", "spread")
        values: dict[str, Any] = {f"val_{name}": found.get(f"val/{name}") for name in names}
        values |= {f"last_frame_{name}": found.get(f"last_frame/{name}") for name in names[:4]}
        values |= {"drift": found.get("five_cat_probe/drift"), "margin": found.get("five_cat_probe/margin")}
        if values["val_contrastive_accuracy"] is None:
            return values
        each = ", ".join(
            f"{words} {values[f'val_{name}']:.3f} ({values[f'last_frame_{name}']:.3f})"
            for name, words in (("cosine", "cosine"), ("contrastive_accuracy", "contrastive accuracy"),
                                ("recall_at_5", "R@5"))
        )  # fmt: skip
        collapsed = "; COLLAPSED" if values["val_effective_rank"] < COLLAPSE else ""
        if values["drift"]:
            collapsed += "; DRIFTED: its predictions are nearest to another frame than the next one"
        values["quality"] = (
            f"next vector (the last frame's in brackets): {each}; effective rank {values['val_effective_rank']:.2f} of "
            f"the data's{collapsed}"
        )
        return values


class _Trained:
    """A module as a `Predictor`: one context at a time where it was trained so, else the whole history."""

    def __init__(self, module: LatentModule) -> None:
        self.module, self.reach = module, module.context
        self.windows = WindowPredictor(self._last, module.context)
        if module.history > module.context:
            self.reach = 1 << 30

    def document(self, frames_FD: Tensor) -> Tensor:
        if self.reach == self.module.context:
            return self.windows.document(frames_FD)
        return self.module.model(frames_FD[None].to(self.module.device)).y[0].cpu()

    def history(self, frames_BLD: Tensor) -> Tensor:
        if self.reach == self.module.context:
            return self.windows.history(frames_BLD)
        return torch.cat([self._last(part) for part in frames_BLD.split(64)])

    def _last(self, frames_BLD: Tensor) -> Tensor:
        return self.module.model(frames_BLD.to(self.module.device)).y[:, -1].cpu()
