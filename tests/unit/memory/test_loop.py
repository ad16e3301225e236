"""The loop over chunks as an autograd function: what it refuses, and its gradients in bfloat16."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.hierarchy import Hierarchy
from tests.support.hierarchy_cases import Inputs, make_hierarchy, make_inputs
from tests.support.memory_cases import relative_errors

BFLOAT16 = 0.05  # relative error; 0.035 is the most seen


def leaves_of(hierarchy: Hierarchy, inputs: Inputs) -> list[Tensor]:
    return [*(x.requires_grad_() for x in inputs), *hierarchy.parameters()]


def test_a_graph_serves_one_backward_pass():
    hierarchy, inputs = make_hierarchy(), make_inputs(20)
    leaves = leaves_of(hierarchy, inputs)
    total = hierarchy(*inputs)[0].sum()
    torch.autograd.grad(total, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="gone after its first backward pass; call the model again"):
        torch.autograd.grad(total, leaves)


def test_second_derivatives_are_refused():
    """They would be silently wrong."""
    hierarchy, inputs = make_hierarchy(), make_inputs(20)
    leaves = leaves_of(hierarchy, inputs)
    with pytest.raises(RuntimeError, match="no second derivatives: call backward without create_graph"):
        torch.autograd.grad(hierarchy(*inputs)[0].sum(), leaves, create_graph=True)


@pytest.mark.parametrize("restarts", [(), (3, 70)])
@pytest.mark.parametrize("chunk", [8, 64, 256])
def test_bfloat16_gradients_are_those_of_float32(chunk, restarts):
    """For every input and parameter; products of more than 64 tokens are computed in another way."""
    T, heads, head_dim = 300, 2, 16
    torch.manual_seed(0)
    spec = MemorySpec(32, heads, head_dim, (chunk,), 256, 256, rank=31, hidden=16)
    hierarchy = Hierarchy(spec)
    q, k = (nnf.normalize(torch.randn(2, heads, T, head_dim), dim=-1) for _ in range(2))
    inputs = Inputs(torch.randn(2, T, 32), q, k, torch.randn(2, heads, T, head_dim))
    leaves = leaves_of(hierarchy, inputs)
    restart = None
    if restarts:
        restart = torch.zeros(2, T, dtype=torch.bool)
        restart[:, list(restarts)] = True
    weight = torch.randn(2, heads, T, head_dim)

    def evaluate(low: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y, _ = hierarchy(*inputs, restart_BT=restart)
        return [y.float(), *torch.autograd.grad((y.float() * weight).sum(), leaves)]

    errors = relative_errors(evaluate(False), evaluate(True))
    assert max(errors) < BFLOAT16
    assert max(errors) > 1e-4  # it was bfloat16
