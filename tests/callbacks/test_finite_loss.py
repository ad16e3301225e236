"""FiniteLoss: trips before the weights change, stays silent otherwise, leaves training alone, ranks agree."""

import copy
import math
from typing import Any

import lightning
import pytest
import torch

from callbacks.finite_loss import FiniteLoss, NonFiniteLoss


class Weights(lightning.Callback):
    """The weights as each step begins."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(copy.deepcopy(pl_module.state_dict()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_it_trips_before_the_weights_change(fit: Any, line: Any, value: float) -> None:
    module, weights = line(bad={3: value}), Weights()
    with pytest.raises(NonFiniteLoss, match=r"at step 3.*lower optim\.lr"):
        fit(module, weights, FiniteLoss())
    assert len(weights.before) == 4
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights.before[3][name]), "the bad loss reached the weights"
        assert torch.isfinite(tensor).all()
        assert not torch.equal(tensor, weights.before[2][name]), "the test would not notice"


def test_a_bad_gradient_of_a_fine_loss_trips_it_too(fit: Any, line: Any) -> None:
    """Clipping by a norm of NaN would write NaN into every weight."""
    module, weights = line(), Weights()
    module.on_after_backward = lambda: (
        module.layer.weight.grad.view(-1)[1:2].fill_(math.nan) if module.global_step == 3 else None
    )
    with pytest.raises(NonFiniteLoss, match=r"the gradient's norm became nan at step 3.*weights are intact"):
        fit(module, weights, FiniteLoss(), gradient_clip_val=1.0)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights.before[3][name])
        assert torch.isfinite(tensor).all()


def test_it_is_silent_and_bitwise_inert_on_a_healthy_run(fit: Any, line: Any) -> None:
    with_it, without = line(), line()
    fit(with_it, FiniteLoss())
    fit(without)
    for ours, theirs in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strategy:
        def __init__(self, others: bool) -> None:
            self.others, self.asked = others, 0

        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            self.asked += 1
            return (decision and self.others) if all else (decision or self.others)

    class TwoRanks:
        world_size, global_step = 2, 5

        def __init__(self, others: bool) -> None:
            self.strategy = Strategy(others)

    guard, fine = FiniteLoss(), torch.tensor(1.0)
    healthy = TwoRanks(others=True)
    guard.on_before_backward(healthy, None, fine)  # type: ignore[arg-type]
    assert healthy.strategy.asked == 1, "a rank that does not vote lets the other wait for ever"
    with pytest.raises(NonFiniteLoss):
        guard.on_before_backward(TwoRanks(others=False), None, fine)  # type: ignore[arg-type]
    sick = TwoRanks(others=True)
    with pytest.raises(NonFiniteLoss):
        guard.on_before_backward(sick, None, fine * math.nan)  # type: ignore[arg-type]
    assert sick.strategy.asked == 1
