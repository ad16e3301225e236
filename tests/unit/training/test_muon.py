"""Muon in batches: PyTorch's steps, state and settings."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import Muon

from atlas_lm.training.muon import BatchedMuon

SHAPES = [(40, 64), (64, 40), (40, 64), (32, 32), (40, 64)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def stepped(optimizer, together: bool, steps: int = 3) -> list[torch.Tensor]:
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    for n in range(steps):
        generator = torch.Generator().manual_seed(n)
        for p in owned:
            p.grad = torch.randn(p.shape, generator=generator)
        (optimizer.step_together if together else optimizer.step)()
    return owned


@pytest.mark.parametrize(
    "settings",
    [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 2, "weight_decay": 0.0}],
    ids=str,
)
def test_its_steps_are_those_of_pytorch(settings):
    one, other = Muon(parameters(), lr=0.02, **settings), BatchedMuon(parameters(), lr=0.02, **settings)
    before = parameters()
    for p, a, b in zip(before, stepped(one, False), stepped(other, True), strict=True):
        moved = (a - p).norm()
        assert (a - b).norm() < 0.02 * moved, "bfloat16 rounds the two in other places"
        assert torch.equal(one.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"])


def test_a_wrong_coefficient_is_seen():
    one, other = Muon(parameters(), lr=0.02), BatchedMuon(parameters(), lr=0.02, ns_coefficients=(3.4, -4.7, 2.0))
    a, b = stepped(one, False)[0], stepped(other, True)[0]
    assert (a - b).norm() > 0.02 * (a - parameters()[0]).norm()


def test_a_parameter_without_a_gradient_stays():
    owned = parameters()
    before = copy.deepcopy(owned)
    owned[0].grad = torch.randn(SHAPES[0])
    BatchedMuon(owned, lr=0.02).step_together()
    assert not torch.equal(owned[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(owned[1:], before[1:], strict=True))
    BatchedMuon(before, lr=0.02).step_together()


def test_on_a_cpu_it_is_pytorchs_to_the_bit():
    for a, b in zip(
        stepped(Muon(parameters(), lr=0.02), False), stepped(BatchedMuon(parameters(), lr=0.02), False), strict=True
    ):
        assert torch.equal(a, b)


def test_a_state_of_pytorchs_is_taken_over():
    one = Muon(parameters(), lr=0.02)
    stepped(one, False)
    other = BatchedMuon(parameters(1), lr=0.02)
    other.load_state_dict(one.state_dict())
    assert stepped(other, True, 1)
