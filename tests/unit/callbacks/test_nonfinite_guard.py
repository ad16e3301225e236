"""NonfiniteGuard skips a bad step without touching the weights, stops at too many, and else leaves training alone."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from callbacks.nonfinite_guard import NonfiniteGuard, NonFiniteTraining, largest
from tests.support.toys import Lines


class Weights(lightning.Callback):
    """The weights and moments as each batch begins."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        moments = {f"moment {i}": s for i, s in enumerate(trainer.optimizers[0].state.values())}
        self.before.append(copy.deepcopy({**pl_module.state_dict(), **moments}))

    def same(self, a: int, b: int) -> bool:
        """Whether nothing changed between the beginnings of batches a and b."""
        flat = [torch.utils._pytree.tree_leaves(self.before[i]) for i in (a, b)]
        return all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


def poison_gradient(module: Any, steps: set[int]) -> Any:
    """One NaN among the gradients of a loss that is fine."""
    module.on_after_backward = lambda: (
        module.layer.weight.grad.view(-1)[1:2].fill_(math.nan) if module.global_step in steps else None
    )
    return module


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_it_skips_a_bad_loss(fit: Any, line: Any, value: float) -> None:
    module, weights, guard, lines = line(bad={3: value, 5: value}), Weights(), NonfiniteGuard(1), Lines()
    fit(module, weights, guard, gradient_clip_val=1.0, logger=lines, log_every_n_steps=16)
    assert [i for i in range(1, 7) if weights.same(i, i + 1)] == [3, 5], "those steps, and no other, change nothing"
    assert all(p.isfinite().all() for p in module.parameters())
    assert guard.skipped == 2
    counts = [
        (step, row["nonfinite_guard/skipped_steps"])
        for step, row in lines.rows
        if "nonfinite_guard/skipped_steps" in row
    ]
    assert counts == [(3, 1.0), (5, 2.0)], "also between the steps at which Lightning logs"


def test_it_skips_a_bad_gradient_of_a_fine_loss(fit: Any, line: Any) -> None:
    """Clipping by a norm of NaN would write NaN into every weight."""
    module, weights = poison_gradient(line(), {3}), Weights()
    fit(module, weights, NonfiniteGuard(1), gradient_clip_val=1.0)
    assert [i for i in range(1, 7) if weights.same(i, i + 1)] == [3]


@pytest.mark.parametrize(("allowed", "bad", "last"), [(0, {3}, 3), (1, {3, 4}, 4), (2, {2, 3, 4}, 4)])
def test_it_stops_at_too_many_in_a_row(fit: Any, line: Any, allowed: int, bad: set[int], last: int) -> None:
    module, weights = line(bad=dict.fromkeys(bad, math.nan)), Weights()
    named = ".*".join(rf"step {step} \(loss on rank 0; gradient on rank 0\)" for step in sorted(bad))
    with pytest.raises(NonFiniteTraining, match=rf"{named}.*max_consecutive={allowed}.*lower optim\.lr"):
        fit(module, weights, NonfiniteGuard(allowed))
    assert len(weights.before) == last + 1
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights.before[min(bad)][name]), "the weights are not intact"


def test_a_good_step_ends_a_streak(fit: Any, line: Any) -> None:
    guard = NonfiniteGuard(2)
    fit(line(bad=dict.fromkeys((0, 1, 3, 4, 6, 7), math.nan)), guard)
    assert guard.skipped == 6


def test_it_judges_a_whole_accumulation_window(fit: Any, line: Any) -> None:
    """NaN in the first of four micro-batches, the last three being fine."""
    module = line()
    true_step = module.training_step
    module.training_step = lambda batch, batch_idx: true_step(batch, batch_idx) * (math.nan if batch_idx == 4 else 1.0)
    with pytest.raises(NonFiniteTraining, match=r"step 1 \(loss on rank 0; gradient on rank 0\)"):
        fit(module, NonfiniteGuard(0), accumulate_grad_batches=4)
    assert len(module.seen) == 8, "it waits for the window's end"


def test_a_loss_without_gradient_counts_too(fit: Any, line: Any) -> None:
    """∞ + the loss: the gradient stays finite."""
    module = line()
    true_step = module.training_step
    module.training_step = lambda batch, batch_idx: true_step(batch, batch_idx) + (math.inf if batch_idx == 2 else 0.0)
    with pytest.raises(NonFiniteTraining, match=r"step 2 \(loss on rank 0\):"):
        fit(module, NonfiniteGuard(0))


def test_large_finite_gradients_are_finite() -> None:
    large = [torch.full((9,), 3e38), torch.tensor([2.0], dtype=torch.bfloat16), torch.empty(0, 4)]
    assert torch.nn.utils.get_total_norm(large[:1]).isinf(), "the test would not notice"
    assert float(largest(large)) == pytest.approx(3e38)
    assert largest([*large, torch.tensor([1.0, math.nan])]).isnan()
    assert float(largest([])) == 0


def test_with_a_loss_scaler_it_only_watches(fit: Any, line: Any) -> None:
    """A scaler looks for its scale by overflowing; only a loss that is not finite itself is beyond its help."""

    class Scaled(lightning.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    guard, module = NonfiniteGuard(0), poison_gradient(line(), {2})
    fit(module, Scaled(), guard, max_steps=3)
    assert guard.skipped == 1
    assert module.layer.weight.isnan().any(), "the gradient was left to the scaler, which here does nothing"
    with pytest.raises(NonFiniteTraining, match=r"step 2 \(loss on rank 0; gradient"):
        fit(line(bad={2: math.nan}), Scaled(), NonfiniteGuard(0))


def test_it_is_silent_and_bitwise_inert_on_a_healthy_run(fit: Any, line: Any, same_training: Any) -> None:
    guard, lines = NonfiniteGuard(0), Lines()
    same_training(fit(line(), guard, logger=lines), fit(line()))
    assert guard.skipped == 0
    assert not [row for _, row in lines.rows if "nonfinite_guard/skipped_steps" in row]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_a_streak_continues_over_a_resume(fit: Any, line: Any, tmp_path: Path) -> None:
    bad = dict.fromkeys((2, 3, 4), math.nan)
    fit(line(bad=bad), NonfiniteGuard(2), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    guard = NonfiniteGuard(2)
    with pytest.raises(NonFiniteTraining, match=r"step 2 .*step 3 .*step 4 "):
        fit(line(bad=bad), guard, ckpt_path=tmp_path / "4.ckpt")
    assert guard.skipped == 3


def test_a_rollback_leaves_its_counters_alone() -> None:
    assert NonfiniteGuard.survives_rollback


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_consecutive=-1 of nonfinite_guard must be at least 0"):
        NonfiniteGuard(-1)
