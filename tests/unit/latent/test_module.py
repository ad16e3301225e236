"""The module: what guards may do to a step, what a document read in pieces gives, what it reports."""

from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from atlas_lm.config.model import ModelConfig
from atlas_lm.config.schema import OptimConfig
from atlas_lm.latent.baselines import pairs_of
from atlas_lm.latent.five_cat import Sets, measure
from atlas_lm.latent.model import LatentModel
from atlas_lm.latent.module import LatentModule
from callbacks.five_cat_probe import HasOffsetCosines
from callbacks.loss_weight_schedule import HasLossWeights
from callbacks.spike_rollback import HasHeldOutLoss
from tests.support.latent_toys import CONTEXT, DIM, turning_documents

MODEL: dict[str, Any] = {
    "name": "x", "dim": 32, "layers": 2, "heads": 2, "head_dim": 16, "window": 8, "ffn_multiple": 2.0,
    "fusion": "convex", "memory": "none", "local_chunks": [], "global_chunk": 4, "shard": 4, "network": "linear",
    "residual": False, "features": "sketch", "rank": 15, "memory_hidden": 16, "context": 1, "update": "delta",
    "eta_max": 1.0, "half_life": 32.0, "radius": 8.0, "reset_at_document": False, "polarisation_cap": 0.1,
    "rope_base": 10000.0, "conv": 1,
}  # fmt: skip
OPTIM = {
    "name": "adamw", "lr": 1e-2, "muon_lr": 0.02, "memory_lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.95],
    "warmup_steps": 1, "total_steps": 50, "min_lr_ratio": 1.0, "clip": 1.0,
}  # fmt: skip


def build(history: int = CONTEXT, memory: str = "none", **settings: Any) -> LatentModule:
    torch.manual_seed(0)
    return LatentModule({**MODEL, "memory": memory}, OPTIM, DIM, "unknown", CONTEXT, history, **settings)


def batch(rows: int = 24, seed: int = 0) -> dict[str, Tensor]:
    documents = [torch.from_numpy(x) for x in turning_documents(rows, 11, seed=seed)]
    scored = torch.zeros(rows, CONTEXT, dtype=torch.bool)
    scored[:, -1] = True
    return {"frames": torch.stack(documents), "valid": torch.ones(rows, 11, dtype=torch.bool), "scored": scored}


def fit(module: LatentModule, steps: int = 1, **weights: float) -> lightning.Trainer:
    for name, weight in weights.items():
        module.set_loss_weight(name, weight)
    data = DataLoader([batch()] * steps, batch_size=None)  # type: ignore[arg-type]
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=OPTIM["clip"], limit_val_batches=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, data, data)
    return trainer


def test_it_has_what_the_safeguards_ask_for() -> None:
    module = build()
    assert isinstance(module, HasOffsetCosines)
    assert isinstance(module, HasLossWeights)
    assert isinstance(module, HasHeldOutLoss)


# The cap


class Recording(LatentModule):
    """Keeps the gradients of each step."""

    def on_after_backward(self) -> None:
        super().on_after_backward()
        self.kept = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def gradient(cap: float | None, weight: float) -> Tensor:
    torch.manual_seed(0)
    module = Recording(MODEL, OPTIM, DIM, "unknown", CONTEXT, CONTEXT, guard_cap=cap)
    fit(module, anticopy=weight, direction=weight, future=weight)
    return torch.cat([g.flatten() for g in module.kept])


def test_the_guards_of_a_step_add_no_more_than_the_cap() -> None:
    main = gradient(0.1, 0.0)
    for weight in (0.01, 10.0):
        added = (gradient(0.1, weight) - main).norm()
        assert float(added) == pytest.approx(0.1 * float(main.norm()), rel=1e-3)
    assert (gradient(None, 10.0) - main).norm() > 100 * main.norm(), "without it they are all that there is"


def test_a_guard_within_the_cap_acts_in_full() -> None:
    main = gradient(None, 0.0)
    assert torch.allclose(gradient(0.1, 1e-6) - main, gradient(None, 1e-6) - main, atol=1e-9)
    assert (gradient(0.1, 1e-6) - main).norm() > 0


def test_the_loss_that_others_judge_is_the_main_one() -> None:
    """Guards that set in would look like an outlier."""
    without, under = (fit(build(), anticopy=weight).callback_metrics["train/loss"] for weight in (0.0, 100.0))
    assert without == under


def test_a_ratio_is_logged_only_where_there_are_guards() -> None:
    assert "latent/guard_ratio" not in fit(build()).callback_metrics
    found = fit(build(), direction=1.0).callback_metrics
    assert found["latent/guard_ratio"] > 1
    assert float(found["latent/guard_scale"]) == pytest.approx(0.1 / float(found["latent/guard_ratio"]))


# The models


@pytest.mark.parametrize("trunk", ["blocks", "gru"])
@pytest.mark.parametrize("head", ["direct", "residual"])
def test_predictions_have_unit_length_and_learn(trunk: str, head: str) -> None:
    module = build(trunk=trunk, head=head)
    before = module.held_out_loss(batch())
    y = module(batch()).y
    assert torch.allclose(y.norm(dim=-1), torch.ones(y.shape[:2]), atol=1e-5)
    trainer = fit(module, 50)
    assert module.held_out_loss(batch()) < before - 0.3
    assert ("latent/alpha" in trainer.callback_metrics) == (head == "residual")


@pytest.mark.parametrize("memory", ["atlas", "none"])
def test_a_document_read_in_pieces_gives_what_it_gives_as_a_whole(memory: str) -> None:
    module = build(64, memory)
    fit(module, 3)
    model = module.model.eval()
    frames = torch.from_numpy(turning_documents(1, 40)[0])[None]
    with torch.no_grad():
        whole = model(frames).y
        state, parts = model.initial_state(1), []
        for piece in frames.split([1, 6, 3, 17, 13], dim=1):
            predicted = model(piece, state)
            parts.append(predicted.y)
            state = predicted.state
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_the_memory_carries_what_lies_before_the_windows_of_all_layers() -> None:
    frames = torch.from_numpy(turning_documents(1, 40)[0])[None]
    other = frames.clone()
    other[:, :5] = torch.from_numpy(turning_documents(1, 5, seed=9)[0])
    for memory, differs in (("atlas", True), ("none", False)):
        model = build(64, memory).model.eval()
        with torch.no_grad():
            a, b = model(frames).y[:, 30:], model(other).y[:, 30:]
        assert torch.allclose(a, b, atol=1e-7) != differs


def test_the_residual_head_without_a_step_repeats_the_last_frame() -> None:
    model = build(head="residual").model
    torch.nn.init.zeros_(model.leave.weight)
    torch.nn.init.zeros_(model.leave.bias)
    frames = batch()["frames"][:, 3:8]
    assert torch.allclose(model(frames).y, frames, atol=1e-6)


def test_frames_of_another_dimension_are_named() -> None:
    with pytest.raises(ValueError, match="16"):
        build().model(torch.zeros(2, 5, 9))


@pytest.mark.parametrize(("name", "value"), [("trunk", "x"), ("head", "x"), ("mse", "x"), ("temperature", 0.0)])
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"module.{name}"):
        build(**{name: value})


# The measures


def test_cosines_by_offset_are_those_of_the_five_tests() -> None:
    """The probe's way (rows of frames) and the tests' way (documents) agree."""
    documents = [torch.from_numpy(x) for x in turning_documents(6, 11, seed=4)]
    module = build().eval()
    found = measure(module.predictor(), Sets(documents, torch.zeros(DIM), CONTEXT), torch.zeros(DIM), whole=False)
    rows = []
    for frames in documents:
        for start in range(11 - CONTEXT):
            padded, valid = torch.zeros(11, DIM), torch.zeros(11, dtype=torch.bool)
            low, high = max(0, start - 3), min(11, start + CONTEXT + 3)
            padded[low - start + 3 : high - start + 3], valid[low - start + 3 : high - start + 3] = (
                frames[low:high], True,
            )  # fmt: skip
            rows.append((padded, valid))
    scored = torch.zeros(len(rows), CONTEXT, dtype=torch.bool)
    scored[:, -1] = True
    given = {"frames": torch.stack([x for x, _ in rows]), "valid": torch.stack([v for _, v in rows]), "scored": scored}
    offsets = list(found.offsets)
    with torch.no_grad():
        cosines = module.offset_cosines(given, offsets).nanmean(0)
    assert cosines.tolist() == pytest.approx([found.offsets[k] for k in offsets], abs=1e-5)
    assert len(pairs_of(documents, CONTEXT).targets_ND) == len(rows)


def test_the_held_out_loss_is_one_less_the_cosine() -> None:
    module = build().eval()
    y, given = module(batch()).y, batch()
    cosine = (y[:, -1] * given["frames"][:, 8]).sum(-1).mean()
    assert torch.allclose(module.held_out_loss(given), 1 - cosine)


def test_a_collapse_is_in_the_verdict() -> None:
    found = {f"val/{name}": 0.5 for name in ("cosine", "contrastive_accuracy", "recall_at_1", "recall_at_5", "spread")}
    found |= {f"last_frame/{name}": 0.4 for name in ("cosine", "contrastive_accuracy", "recall_at_5")}
    healthy, flat = (build().report_values({**found, "val/effective_rank": rank}) for rank in (0.8, 0.01))
    assert "COLLAPSED" not in healthy["quality"]
    assert "COLLAPSED" in flat["quality"]
    assert "DRIFTED" not in healthy["quality"]
    drifted = build().report_values({**found, "val/effective_rank": 0.8, "five_cat_probe/drift": 1.0})
    assert "DRIFTED" in drifted["quality"]


def test_hyperparameters_are_plain() -> None:
    """A checkpoint is read with weights_only."""
    module = build(guard_cap=None)
    again = LatentModule(**module.hparams)
    assert dict(again.hparams) == dict(module.hparams)
    assert isinstance(again.model_config, ModelConfig)
    assert isinstance(again.optim_config, OptimConfig)
    assert isinstance(again.model, LatentModel)
