"""W_init as the mathematics has it: gates open and constant, W_up near zero, W_down with orthogonal columns."""

import pytest
import torch

from atlas_lm.memory.fast_memory import initialise_weights
from atlas_lm.memory.network import build_network


def test_a_gated_network_begins_empty_with_open_gates() -> None:
    torch.manual_seed(0)
    w_in, w_out = (torch.nn.Parameter(torch.empty(2, *shape)) for shape in ((512, 128), (64, 64)))
    with torch.no_grad():
        initialise_weights(build_network("gated_mlp", False), [w_in, w_out], constant=0.5)
    gate, up = w_in.detach().chunk(2, dim=-1)
    assert torch.equal(gate[:, 0], torch.full((2, 64), 4.0)), "σ(2) where feature 0 is its constant"
    assert gate[:, 1:].std().item() == pytest.approx(50 * up[:, 1:].std().item(), rel=0.01)
    assert up.std().item() == pytest.approx(0.002, rel=0.02)
    for head in w_out.detach():
        assert torch.allclose(head.T @ head, 2.25 * torch.eye(64), atol=1e-4)
