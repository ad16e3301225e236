"""Our autograd functions under what PyTorch wraps around them: checkpointing, second and batched derivatives."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from atlas_lm.memory import gated_delta
from atlas_lm.memory.fast_memory import MemorySpec
from atlas_lm.memory.features import Sketch
from atlas_lm.memory.kernels import attention as cpu_attention
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.kernels import delta as cpu_delta
from atlas_lm.memory.kernels import features as cpu_features
from atlas_lm.memory.kernels import norm as cpu_norm
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.newton_schulz import newton_schulz
from atlas_lm.model.attention import SlidingWindowAttention
from atlas_lm.model.block import Block, MemoryBranch, memory_heads
from atlas_lm.model.norm import RMSNorm, normalised_heads
from tests.support.hierarchy_cases import SPEC, make_hierarchy, make_inputs
from tests.support.model_cases import build_model, make_tokens


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both ways through a block on a CPU; a GPU takes the second."""
    if request.param == "torch":
        for module in (cpu_attention, cpu_convolution, cpu_delta, cpu_features, cpu_loop):
            monkeypatch.setattr(module, "can_run", lambda *_: False)
        monkeypatch.setattr(cpu_norm, "can_run", lambda *_: False)
    else:
        assert compiled.library() is not None, "no C++ compiler: the compiled code is not tested"
    return request.param


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("network", ["gated_mlp", "linear"])
@pytest.mark.parametrize("memory", [True, False])
def test_activation_checkpointing_changes_no_bit(reentrant, network, memory, path):
    torch.manual_seed(0)
    spec = SPEC._replace(network=network) if memory else None
    block = Block(spec, SPEC.dim, SPEC.heads, SPEC.head_dim, 12, 5, 1e4, 4, "convex")
    x = torch.randn(2, 50, SPEC.dim, requires_grad=True)
    weight = torch.randn(2, 50, SPEC.dim)

    def gradients(run) -> list[Tensor]:
        block.zero_grad()
        x.grad = None
        (run(x) * weight).sum().backward()
        return [x.grad.clone(), *(p.grad.clone() for p in block.parameters())]

    def forward(x: Tensor) -> Tensor:
        return block(x, None, None)[0]

    truth = gradients(forward)
    found = gradients(lambda x: checkpoint(forward, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(truth, found, strict=True))


def test_every_function_is_among_those_below():
    """A new one has to be added to the test of second derivatives."""
    ours = {f.__name__ for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("atlas_lm.")}
    assert ours == {
        "_CompiledLoop", "_Convolution", "_FromEnd", "_Heads", "_Loop", "_Norm", "_Scan", "_ToEnd", "_TritonLoop",
        "DecayProducts", "_Sketch", "_WindowAttention",
    }  # fmt: skip


def cases() -> dict[str, tuple]:
    """Of every function a call and what to differentiate by."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True)
    heads = torch.randn(2, 2, 20, 4, dtype=torch.float64, requires_grad=True)
    norm, attention = RMSNorm(8).double(), SlidingWindowAttention(8, 2, 4, 5, 1e4).double()
    branch, sketch = MemoryBranch(MemorySpec(8, 2, 4, (3,), 4, 4, rank=5, hidden=4), 4).double(), Sketch(4, 5).double()
    hierarchy, inputs = make_hierarchy(), make_inputs(20)
    inputs.v.requires_grad_()
    one, state = torch.ones(2, 2, 20, dtype=torch.float64), torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    return {
        "norm": (lambda: norm(x), x),
        "delta": (lambda: gated_delta.scan(heads, heads, heads, one, one, state)[0], heads),
        "norm of heads": (lambda: normalised_heads(RMSNorm(4).double(), heads), heads),
        "attention": (lambda: attention(x, None)[0], x),
        "convolution": (lambda: memory_heads(branch.qkv(x), x.new_zeros(2, 3, 24), branch.conv, 2)[0], x),
        "convolution alone": (lambda: branch.conv(branch.qkv(x), x.new_zeros(2, 3, 24))[0], x),
        "sketch": (lambda: sketch(heads), heads),
        "memory": (lambda: hierarchy(*inputs)[0], inputs.v),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_second_derivatives_are_refused_by_every_compiled_function(name):
    assert compiled.library() is not None
    function, leaf = cases()[name]
    with pytest.raises(RuntimeError, match="no second derivatives: call backward without create_graph"):
        torch.autograd.grad(function().square().sum(), leaf, create_graph=True)


def test_a_gradient_penalty_is_refused_without_a_memory_too():
    """The twin's norms and attention would give a penalty that is wrong by a quarter."""
    model, tokens = build_model(memory="none"), make_tokens(20)
    loss = nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten())
    with pytest.raises(RuntimeError, match="no second derivatives: call backward without create_graph"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_second_derivatives_of_the_parts_are_right_through_pytorch(monkeypatch):
    monkeypatch.setattr(cpu_norm, "can_run", lambda *_: False)
    for module in (cpu_attention, cpu_convolution, cpu_delta, cpu_features):
        monkeypatch.setattr(module, "can_run", lambda *_: False)
    for name, (function, leaf) in cases().items():
        if name != "memory":
            with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention refuses them too
                (first,) = torch.autograd.grad(function().square().sum(), leaf, create_graph=True)
            assert torch.autograd.grad(first.square().sum(), leaf)[0].isfinite().all(), name


@pytest.mark.parametrize("name", list(cases()))
def test_batched_gradients_are_refused_or_right(name):
    """`is_grads_batched` gives a backward pass tensors without an address of their own."""
    function, leaf = cases()[name]
    y = function()
    weights = torch.randn(3, *y.shape, dtype=y.dtype)
    if name == "memory":
        expected = [torch.autograd.grad((function() * w).sum(), leaf)[0] for w in weights]
    else:
        expected = [torch.autograd.grad(y, leaf, w, retain_graph=True)[0] for w in weights]
    try:
        (found,) = torch.autograd.grad(y, leaf, weights, is_grads_batched=True)
    except (RuntimeError, ValueError):
        return
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("changes", [{}, {"update": "newton_schulz"}, {"reset_at_document": True}], ids=str)
@pytest.mark.parametrize("T", [48, 60])  # 60 leaves the last shard of 24 padded
def test_float16_gradients_are_finite_where_a_shard_is_padded(T, changes, path):
    model, tokens = build_model(torch.float32, **changes).half(), make_tokens(T)
    loss = nn.functional.cross_entropy(model(tokens).logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    assert [name for name, p in model.named_parameters() if not p.grad.isfinite().all()] == []


def test_newton_schulz_keeps_a_zero_matrix_in_float16():
    x = torch.zeros(2, 4, 6, dtype=torch.float16, requires_grad=True)
    y = newton_schulz(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all()
    assert y.dtype == torch.float16
    assert not gradient.isnan().any()
