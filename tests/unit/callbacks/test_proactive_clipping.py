"""ProactiveClipping: the threshold follows the chunk size exactly, acts in the same step, is halved around changes."""

import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from callbacks.proactive_clipping import ProactiveClipping
from tests.support.toys import Line


class Chunked(Line):
    """Its chunk sizes are those of `plan` at each step; sees its gradients' norm after the clipping."""

    def __init__(self, plan: dict[int, tuple[int, ...]] | None = None) -> None:
        super().__init__()
        self.plan = plan or {}
        self.local_chunks: tuple[int, ...] = (32, 8)
        self.norms: list[float] = []

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.local_chunks = self.plan.get(self.global_step, self.local_chunks)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.norms.append(self.norm()))
        return optimizer

    def norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))


class Watch(lightning.Callback):
    """The Trainer's threshold as each step clips, and the metrics logged by then."""

    def __init__(self) -> None:
        self.thresholds: list[float] = []
        self.metrics: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.thresholds.append(trainer.gradient_clip_val)
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_formula_is_exact() -> None:
    clipping = ProactiveClipping()
    with localcontext(prec=50):
        for chunk in range(1, 65):
            exact = Decimal("0.5") * (Decimal(32) / Decimal(chunk)).sqrt()
            assert clipping.threshold(chunk) == 0.5 * math.sqrt(32 / chunk)
            assert abs(Decimal(clipping.threshold(chunk)) - exact) <= Decimal(math.ulp(float(exact)))
    assert [clipping.threshold(chunk) for chunk in (32, 8, 2)] == [0.5, 1.0, 2.0]
    assert round(clipping.threshold(1), 2) == 2.83


def test_the_threshold_is_halved_around_changes() -> None:
    clipping = ProactiveClipping(transition_steps=3)
    sizes = [(32, 8)] * 2 + [(8, 8)] * 5 + [(8, 2), (8, 1)] + [(8, 1)] * 3
    assert [clipping.at_step(chunks) for chunks in sizes] == [
        0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0,
    ]  # fmt: skip
    assert clipping.transitions == 3, "a change of any memory is one; the largest alone sets the threshold"
    assert ProactiveClipping(transition_steps=0).at_step((32,)) == 0.5
    never = ProactiveClipping(transition_steps=0)
    assert [never.at_step((size,)) for size in (32, 8)] == [0.5, 1.0]


def test_it_clips_in_the_same_step(fit: Any) -> None:
    module, watch = Chunked(plan={3: (8, 8), 6: (2, 2)}), Watch()
    clipping = ProactiveClipping(kappa_base=0.05, transition_steps=2)
    fit(module, clipping, watch)
    expected = [0.05, 0.05, 0.05, 0.05, 0.05, 0.1, 0.1, 0.1]
    assert watch.thresholds == pytest.approx(expected)
    clipped = [norm for norm, kappa in zip(module.norms, expected, strict=True) if norm < kappa * 0.999]
    assert all(norm <= kappa * 1.0001 for norm, kappa in zip(module.norms, expected, strict=True)), module.norms
    assert clipping.clips == 8 - len(clipped)
    assert clipping.clips >= 6, "the test would not notice"
    assert watch.metrics["optim/clip_threshold"] == pytest.approx(0.1)
    assert watch.metrics["proactive_clipping/transitions"] == 2
    assert watch.metrics["proactive_clipping/clips"] == clipping.clips


def test_it_clips_norms_whatever_the_trainer_was_reported(fit: Any) -> None:
    trainer = fit(Chunked(), ProactiveClipping(), gradient_clip_val=9.0, gradient_clip_algorithm="value", max_steps=1)
    assert trainer.gradient_clip_val == 0.5
    assert trainer.gradient_clip_algorithm == "norm"


def test_without_a_change_it_is_a_fixed_threshold(fit: Any, same_training: Any) -> None:
    same_training(fit(Chunked(), ProactiveClipping()), fit(Chunked(), gradient_clip_val=0.5))


def test_it_is_bitwise_inert_on_a_healthy_run(fit: Any, same_training: Any) -> None:
    """Gradients below the threshold stay as they are, bit by bit."""
    clipping = ProactiveClipping(kappa_base=1e6)
    same_training(fit(Chunked(plan={3: (8, 8)}), clipping), fit(Chunked(plan={3: (8, 8)})))
    assert clipping.clips == 0
    assert clipping.transitions == 1


def test_a_skipped_step_is_no_clip(fit: Any) -> None:
    """A guard before it may have taken all gradients away."""

    class Skip(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=True)

    module, clipping = Chunked(), ProactiveClipping()
    fit(module, Skip(), clipping)
    assert module.norms == [0.0] * 8
    assert clipping.clips == 0


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_a_resumed_run_continues(fit: Any, tmp_path: Path) -> None:
    """The break lies between a change and the end of its transition."""
    plan, whole = {3: (8, 8)}, Watch()
    clipping = ProactiveClipping(kappa_base=0.05, transition_steps=4)
    fit(Chunked(plan), clipping, whole)
    first = ProactiveClipping(kappa_base=0.05, transition_steps=4)
    fit(Chunked(plan), first, max_steps=5).save_checkpoint(tmp_path / "5.ckpt")
    rest, again, module = Watch(), ProactiveClipping(kappa_base=0.05, transition_steps=4), Chunked()
    module.local_chunks = (8, 8)
    fit(module, again, rest, ckpt_path=tmp_path / "5.ckpt")
    assert whole.thresholds == [0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.1]
    assert rest.thresholds == whole.thresholds[5:]
    assert again.transitions == 1
    assert again.clips == first.clips + sum(
        norm > 0.9 * k for norm, k in zip(module.norms, rest.thresholds, strict=True)
    )
    assert again.clips > first.clips > 0, "the test would not notice"


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_a_change_at_the_break_is_one(fit: Any, tmp_path: Path) -> None:
    fit(Chunked(), ProactiveClipping(transition_steps=2), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    clipping, watch = ProactiveClipping(transition_steps=2), Watch()
    fit(Chunked({4: (8, 8)}), clipping, watch, ckpt_path=tmp_path / "4.ckpt")
    assert watch.thresholds == [0.5, 0.5, 1.0, 1.0]
    assert clipping.transitions == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kappa_base": 0.0}, "kappa_base=0.0 .*remove the callback"),
        ({"kappa_base": math.nan}, "kappa_base=nan"),
        ({"reference_chunk": 0}, "reference_chunk=0"),
        ({"transition_steps": -1}, "transition_steps=-1"),
        ({"transition_factor": 0.0}, "transition_factor=0.0"),
        ({"transition_factor": 1.5}, "transition_factor=1.5"),
    ],
)
def test_values_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ProactiveClipping(**changes)


def test_the_module_is_checked_before_step_0(fit: Any, line: Any) -> None:
    with pytest.raises(TypeError, match="needs local_chunks, which Line lacks"):
        fit(line(), ProactiveClipping())
    module = Chunked()
    module.local_chunks = ()
    with pytest.raises(ValueError, match="no local memory"):
        fit(module, ProactiveClipping())
