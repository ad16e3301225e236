"""Products and sums of decays along a chunk, and their gradients, also through decays of 0."""

import pytest
import torch
from torch import Tensor

from atlas_lm.memory.coefficients import _FromEnd, _ToEnd


def leaves(C: int, zeros: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(C)
    x, decay = torch.randn(2, 3, C, dtype=torch.float64), torch.rand(2, 3, C, dtype=torch.float64)
    decay[..., [at for at in zeros if at < C]] = 0
    return x.requires_grad_(), decay.requires_grad_()


@pytest.mark.parametrize("zeros", [(), (3,), (2, 5)])
@pytest.mark.parametrize("C", [1, 2, 7, 16])
def test_they_are_what_their_equations_say(C, zeros):
    x, decay = leaves(C, zeros)
    products = torch.stack([decay[..., s + 1 :].prod(-1) for s in range(C)], -1)
    assert torch.allclose(_ToEnd.apply(decay), products, rtol=1e-12, atol=0)
    r = [x[..., -1]]
    for j in range(C - 2, -1, -1):
        r.append(x[..., j] + decay[..., j + 1] * r[-1])
    assert torch.allclose(_FromEnd.apply(x, decay), torch.stack(r[::-1], -1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("zeros", [(), (3,), (2, 5)])
@pytest.mark.parametrize("C", [1, 2, 7])
def test_their_gradients(C, zeros):
    x, decay = leaves(C, zeros)
    assert torch.autograd.gradcheck(_ToEnd.apply, decay)
    assert torch.autograd.gradcheck(_FromEnd.apply, (x, decay))


def test_second_derivatives_are_refused():
    x, decay = leaves(7, ())
    for y in (_ToEnd.apply(decay), _FromEnd.apply(x, decay)):
        with pytest.raises(RuntimeError, match="no second derivatives: call backward without create_graph"):
            torch.autograd.grad(y.square().sum(), decay, create_graph=True)
