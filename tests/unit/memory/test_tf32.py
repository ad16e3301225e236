"""With TF32 allowed, a GPU rounds the operands of float32 products to ten bits: no gate may pass through one.

Emulated here for every product that PyTorch dispatches. A retention of 2^(−1/4096) would become exactly 1.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_lm.memory import chunked, coefficients
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.network import build_network
from atlas_lm.memory.state import Gates, MemoryState, Rule, Tokens, initial_state

HALF_LIFE = 4096
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "baddbmm_", "addmm_"}


def rounded(x: Any) -> Any:
    """float32 with ten bits after the point, to the nearest; what else there is as it is."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Counts the products whose operands it rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.products += 1
            first = 0 if name in ("mm", "bmm") else 1  # what is added is not rounded
            args = (*args[:first], rounded(args[first]), rounded(args[first + 1]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)


def test_the_emulation_rounds() -> None:
    alpha = torch.tensor([[2 ** (-1 / HALF_LIFE)]])
    with Tf32() as mode:
        assert (alpha @ torch.ones(1, 1)).item() == 1.0
    assert mode.products == 1


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_forgetting_is_not_rounded(chunk: int) -> None:
    """A state that nothing is written into has half its size after one half-life, and its gradient half of it."""
    T, network = HALF_LIFE // 8, build_network("linear", False)
    rule = Rule(network, chunk)
    initial = (torch.zeros(1, 4, 3),)
    start = initial_state(rule, initial, 1, 4)
    change = torch.ones(1, 1, 4, 3, requires_grad=True)
    one, zero = torch.ones(1, 1, T), torch.zeros(1, 1, T)
    gates = Gates(alpha=one * 2 ** (-1 / HALF_LIFE), eta=zero, theta=zero + 0.5, gamma=zero)
    tokens = Tokens(torch.zeros(1, 1, T, 3), torch.ones(1, 1, T, 4) / 2, torch.zeros(1, 1, T, 3), gates)
    with Tf32():
        _, after = chunked.scan(
            rule, MemoryState((change,), start.momentum, start.tail, 0, rule), initial, tokens.k, tokens.phi, tokens
        )
        (slope,) = torch.autograd.grad(after.change[0].sum(), change)
    assert torch.allclose(after.change[0], torch.full((1, 1, 4, 3), 2 ** (-1 / 8)), rtol=1e-4)
    assert torch.allclose(slope, torch.full_like(slope, 2 ** (-1 / 8)), rtol=1e-4)


@pytest.mark.parametrize("restarts", [False, True])
def test_coefficients_of_reads_are_not_rounded(restarts: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 16)
    gates = [torch.rand(shape, generator=generator).requires_grad_() for _ in range(4)]
    gamma = torch.rand(shape, generator=generator).requires_grad_()
    segment = (torch.arange(16) > 6).long()
    same = (segment.unsqueeze(-1) == segment).expand(2, 3, 16, 16) if restarts else None

    def evaluate(wide: Callable[[Tensor], Tensor], mode: Any) -> list[Tensor]:
        leaves = [wide(x.detach()).requires_grad_() for x in (*gates, gamma)]
        with mode:
            found = coefficients.reads(coefficients.Decays(*leaves[:4]), leaves[4], 1, same)
            total = sum((y * y).sum() for y in found)
            return [*found, *torch.autograd.grad(total, leaves)]

    truth = evaluate(lambda x: x.double(), nullcontext())
    for a, b in zip(truth, evaluate(lambda x: x, Tf32()), strict=True):
        assert (a - b).abs().max() <= 3e-6 * a.abs().max()
