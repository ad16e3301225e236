"""The gated delta rule, chunk by chunk, against one token at a time: outputs, final state and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory import gated_delta, reference
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels import delta as kernel


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both ways on a CPU; a GPU takes the second."""
    if request.param == "torch":
        monkeypatch.setattr(kernel, "can_run", lambda *_: False)
    else:
        assert compiled.library() is not None, "no C++ compiler: the compiled code is not tested"


def compiled_path() -> bool:
    return kernel.can_run(torch.ones(1), torch.float32)


def make(T: int, groups: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    B, H, D, E = 2, 3, 6, 5
    q, k = (nnf.normalize(draw(B, groups, T, D), dim=-1) for _ in range(2))
    inputs = [q, k, draw(B, H, T, E), draw(B, H, T).sigmoid(), draw(B, H, T).sigmoid(), draw(B, H, D, E)]
    return [x.requires_grad_() for x in inputs]


def everything(run, inputs: list[Tensor], *more) -> list[Tensor]:
    outputs = run(*inputs, *more)
    weights = [torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)) for y in outputs]
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("T", [1, 16, 37, 130])
def test_it_is_the_rule(T: int, chunk: int, groups: int, restarts: bool, initial: bool) -> None:
    inputs = make(T, groups)
    if restarts:
        with torch.no_grad():
            inputs[3][torch.rand(2, 3, T, generator=torch.Generator().manual_seed(2)) < 0.1] = 0.0
    if initial:
        inputs.append(torch.randn(3, 6, 5, dtype=torch.float64).requires_grad_())
    truth = everything(reference.gated_delta, inputs)
    fast = everything(lambda *x: gated_delta.scan(*x[:6], chunk, *x[6:]), inputs)
    for a, b in zip(truth, fast, strict=True):
        assert (a - b).abs().max() <= 1e-11 * a.abs().max().clamp_min(1)


def test_what_was_before_a_restart_is_gone_without_trace() -> None:
    inputs = [x.detach() for x in make(20)]
    inputs[3][:, :, 8] = 0.0
    y, S = gated_delta.scan(*inputs, 16)
    alone, S_alone = gated_delta.scan(*(x[:, :, 8:] for x in inputs[:5]), torch.zeros_like(inputs[5]), 16)
    assert (y[:, :, 8:] - alone).abs().max() < 1e-12
    assert (S - S_alone).abs().max() < 1e-12


def test_calls_may_cut_the_tokens_anywhere() -> None:
    inputs = make(50)
    whole, S = gated_delta.scan(*inputs, 16)
    state, parts = inputs[5], []
    for start, end in ((0, 1), (1, 30), (30, 50)):
        y, state = gated_delta.scan(*(x[:, :, start:end] for x in inputs[:5]), state, 16)
        parts.append(y)
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-12
    assert (state - S).abs().max() < 1e-12


def test_one_long_chunk_stores_what_short_ones_do() -> None:
    """As many pairs as the key has channels, written at full strength: each is found exactly."""
    D = 16
    k = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    k = nnf.normalize(k + 0.3 * k.roll(1, 0), dim=-1)[None, None]  # correlated
    v = torch.randn(1, 1, D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(1, 1, D, dtype=torch.float64)
    empty = torch.zeros(1, 1, D, D, dtype=torch.float64)
    states = [gated_delta.scan(k, k, v, nothing + 1, nothing + 1, empty, chunk)[1] for chunk in (1, 16)]
    assert (states[0] - states[1]).abs().max() < 1e-12


@pytest.mark.parametrize(("precision", "least"), [("float", 2e-5), ("bfloat16", 0.03)])
def test_gradients_in_narrow_precisions(precision: str, least: float) -> None:
    """Against the rule in float32; with bfloat16 operands a processor's matrix unit computes them."""
    inputs = make(130, 3, torch.float32)
    truth = everything(reference.gated_delta, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found = everything(gated_delta.scan, inputs)
    for a, b in zip(truth, found, strict=True):
        assert (a - b.float()).abs().max() <= least * a.abs().max()


def test_states_are_kept_for_a_backward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled_path():
        pytest.skip("PyTorch keeps by itself")
    asked: list[set[str]] = []
    call = kernel._call
    monkeypatch.setattr(kernel, "_call", lambda *given: asked.append(set(given[2])) or call(*given))
    inputs = make(20)
    with torch.no_grad():
        gated_delta.scan(*inputs)
    gated_delta.scan(*inputs)
    assert [("kept" in names) for names in asked] == [False, True]


def test_wide_tensors_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = gated_delta.scan(*make(20))
    assert y.isfinite().all()


def test_autocast_keeps_sums_wide() -> None:
    inputs = [x.detach().float() for x in make(40)]
    with torch.autocast("cpu", torch.bfloat16):
        y, S = gated_delta.scan(*inputs)
    truth, _ = reference.gated_delta(*inputs)
    assert y.dtype == S.dtype == torch.float32
    assert (y - truth).abs().max() < 0.02 * truth.abs().max(), "operands of products are bfloat16, sums are not"
