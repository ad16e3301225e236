"""The guards are the seed's, and their gradient is no more than the cap's share of the main one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_lm.latent.losses import (
    capped_scale,
    contrast_loss,
    cosines_at,
    gradient_norms,
    guard_losses,
    hinge,
    main_loss,
)
from atlas_lm.latent.metrics import unit

MARGINS = {"future": 0.01, "direction": 0.02, "anticopy": 0.03}


def random_units(*shape: int, seed: int = 0) -> Tensor:
    return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def test_the_main_loss_is_the_squared_error() -> None:
    y, target = random_units(7, 6), random_units(7, 6, seed=1)
    cosine = (y * target).sum(-1)
    assert torch.allclose(main_loss(cosine, 6, "mean"), (y - target).square().mean(), atol=1e-6)
    assert torch.allclose(main_loss(cosine, 6, "sum"), (y - target).square().sum(-1).mean(), atol=1e-6)


def test_guards_by_hand() -> None:
    of = {k: torch.tensor([0.5, 0.5]) for k in range(-4, 4)}
    of[1] = torch.tensor([0.5, 0.6])
    of[0] = torch.tensor([0.7, 0.2])
    of[2] = torch.tensor([0.4, math.nan])
    of[3] = torch.tensor([0.52, math.nan])
    found = guard_losses(of, MARGINS, 5)
    assert float(found["future"]) == pytest.approx(0.0 + 0.03)
    assert float(found["direction"]) == pytest.approx(0.22 / 2)
    assert float(found["anticopy"]) == pytest.approx((0.23 / 2 + 4 * 0.03 / 2) / 5)


def test_a_satisfied_guard_pulls_at_nothing_and_neither_does_a_frame_that_is_not_there() -> None:
    cosine = torch.tensor([0.9, 0.1], requires_grad=True)
    hinge(cosine, torch.tensor([0.2, math.nan]), 0.01).backward()
    assert cosine.grad is not None
    assert cosine.grad.tolist() == [0, 0]


def test_offset_one_of_a_position_is_the_frame_after_it() -> None:
    frames = random_units(2, 11, 6)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1, 9:] = False
    found = cosines_at(frames[:, 4:9], frames, valid, [0, 1, -7, 3], before=3)
    assert torch.allclose(found[1], torch.ones(2, 5), atol=1e-6), "position t is frame 3 + t, and is given frame 4 + t"
    assert found[3].isnan().tolist() == [[False] * 5, [False] * 3 + [True] * 2]
    assert found[2, 0].isnan().tolist() == [True] * 4 + [False]


def toy() -> tuple[torch.nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6)
    y = unit(layer(random_units(16, 6)))
    return layer, main_loss((y * random_units(16, 6, seed=1)).sum(-1), 384, "mean"), 0.01 * y.sum()


@pytest.mark.parametrize("cap", [0.0, 0.1, 1.0])
def test_all_guards_together_stay_below_the_cap(cap: float) -> None:
    layer, main, guards = toy()
    parameters = list(layer.parameters())
    main_norm, guard_norm = gradient_norms([main, guards], parameters)
    assert guard_norm > main_norm, "as with the seed's 0.01, the guards are the larger part"
    (capped,) = gradient_norms([capped_scale(main_norm, guard_norm, cap) * guards], parameters)
    assert float(capped) == pytest.approx(cap * float(main_norm), rel=1e-5)


def test_below_the_cap_nothing_is_scaled_and_without_one_neither() -> None:
    assert capped_scale(torch.tensor(1.0), torch.tensor(0.05), 0.1) == 1
    assert capped_scale(torch.tensor(1.0), torch.tensor(0.0), 0.1) == 1
    assert capped_scale(torch.tensor(1.0), torch.tensor(50.0), None) == 1


def test_contrast_is_won_by_the_target_and_no_frame_of_the_context_is_against_it() -> None:
    frames, valid = random_units(3, 11, 6), torch.ones(3, 11, dtype=torch.bool)
    scored = torch.zeros(3, 5, dtype=torch.bool)
    scored[:, 4] = True
    centre = torch.zeros(6)

    def loss(y_BD: Tensor, of: Tensor = frames) -> float:
        y = torch.zeros(3, 5, 6)
        y[:, 4] = y_BD
        return float(contrast_loss(y, of, valid, scored, 3, 5, 0.05, centre))

    assert loss(frames[:, 8]) < loss(frames[:, 9])
    changed = frames.clone()
    changed[:, 3:8] = frames[:, 8:9]  # the context is the target itself
    assert loss(frames[:, 8], changed) == pytest.approx(loss(frames[:, 8]), abs=1e-6)
    changed[:, 9] = frames[:, 8]
    assert loss(frames[:, 8], changed) > loss(frames[:, 8]) + 0.5, "the frame after it is a candidate"


def test_contrast_counts_no_target_twice() -> None:
    """A run with several scored positions: its frames are candidates once each."""
    frames, valid = random_units(1, 14, 6), torch.ones(1, 14, dtype=torch.bool)
    scored = torch.ones(1, 8, dtype=torch.bool)
    scored[:, :4] = False
    y = random_units(1, 8, 6, seed=3)
    found = float(contrast_loss(y, frames, valid, scored, 3, 5, 1.0, torch.zeros(6)))
    terms: list[Any] = []
    for t in range(4, 8):
        last = 3 + t
        among = [j for j in range(14) if not last - 5 < j <= last]
        logits = frames[0, among] @ y[0, t]
        terms.append(torch.logsumexp(logits, 0) - frames[0, last + 1] @ y[0, t])
    assert found == pytest.approx(float(torch.stack(terms).mean()), abs=1e-5)
