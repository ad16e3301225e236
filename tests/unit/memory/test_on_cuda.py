"""What goes wrong on a GPU alone, shown on a CPU: precisions under its autocast, sums without an order, devices."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_lm.memory import chunked, gated_delta, network, reference
from atlas_lm.memory.fast_memory import FastMemory, MemorySpec
from atlas_lm.memory.features import build_features, unit
from atlas_lm.memory.kernels import features as cpu_features
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.network import build_network
from atlas_lm.memory.state import Rule
from tests.support.hierarchy_cases import make_hierarchy, make_inputs
from tests.support.memory_cases import everything, make_case, run


@pytest.mark.parametrize("kind", ["linear", "quadratic", "sketch"])
def test_features_keep_the_precision_of_what_they_are_of(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """CUDA's autocast gives norms in float32: a map of twice the bytes, and a copy of it for each memory."""
    plain = nnf.normalize
    monkeypatch.setattr(nnf, "normalize", lambda *a, **more: plain(*a, **more).float())
    monkeypatch.setattr(cpu_features, "can_run", lambda *_: False)
    x = torch.randn(3, 8).bfloat16()
    assert unit(x).dtype == torch.bfloat16
    assert build_features(kind, 8, 5).bfloat16()(x).dtype == torch.bfloat16


def test_half_lives_are_no_steps_of_bfloat16() -> None:
    """At the logit of 4,096 tokens, 8.7, bfloat16 has steps of 0.06."""
    torch.manual_seed(0)
    spec = MemorySpec(dim=8, heads=2, head_dim=4, local_chunks=(4,), global_chunk=8, shard=8, rank=6, hidden=4)
    memory = FastMemory(spec._replace(half_life=4096.0), 8, "chunk", build_features("sketch", 4, 6))
    x = torch.randn(1, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = memory.open(x)
    for a, b in zip(memory.open(x), low, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        memory.gates.bias.add_(0.01)
        with torch.autocast("cpu", torch.bfloat16):
            longer = memory.open(x)
    lives = [math.log(2) / -alpha.double().log() for alpha in (low.alpha, longer.alpha)]
    assert torch.allclose(lives[1] / lives[0], torch.full_like(lives[0], math.exp(0.01)), rtol=1e-3)
    assert memory.bfloat16().open(x.bfloat16()).alpha.dtype == torch.float32


class NoFloatSums(TorchDispatchMode):
    """As `trainer.deterministic=true` has it on a GPU, where a cumulative sum of floats raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.startswith("cumsum") and args[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("restarts", [(), (5, 17)])
def test_nothing_is_summed_without_an_order(
    monkeypatch: pytest.MonkeyPatch, restarts: tuple[int, ...], streamed: bool
) -> None:
    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    hierarchy, inputs = make_hierarchy(), make_inputs(60)
    restart = torch.zeros(inputs[0].shape[:2], dtype=torch.bool)
    restart[:, list(restarts)] = True
    state = hierarchy.initial_state(inputs[0].size(0), bool(restarts)) if streamed else None
    leaves: list[Tensor] = [*(x.requires_grad_() for x in inputs), *hierarchy.parameters()]
    with NoFloatSums():
        y, _ = hierarchy(*inputs, state, restart if restarts else None)
        torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("update", ["gradient", "newton_schulz"])
@pytest.mark.parametrize("kind", ["gated_mlp", "linear"])
def test_the_reference_runs_where_its_inputs_are(kind: str, update: str) -> None:
    """What is made without saying where would lie on another device than the inputs: here on meta."""
    case = make_case(kind, 20)
    rule = Rule(case.network, 7, context=2, update=update)
    with torch.device("meta"):
        everything(run(reference, rule, case))


def test_the_gated_delta_rule_runs_where_its_inputs_are() -> None:
    B, H, T, D = 1, 2, 20, 4
    k = nnf.normalize(torch.randn(B, H, T, D), dim=-1)
    gates, state = torch.rand(B, H, T), torch.zeros(B, H, D, D)
    with torch.device("meta"):
        for form in (gated_delta.scan, reference.gated_delta):
            y, _ = form(k, k, k, gates, gates, state)
            assert y.device.type == "cpu"


@pytest.mark.parametrize("restarts", [False, True])
def test_the_layer_runs_where_its_inputs_are(monkeypatch: pytest.MonkeyPatch, restarts: bool) -> None:
    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    hierarchy, inputs = make_hierarchy(), make_inputs(60)
    leaves: list[Tensor] = [*(x.requires_grad_() for x in inputs), *hierarchy.parameters()]
    restart = torch.zeros(inputs[0].shape[:2], dtype=torch.bool) if restarts else None
    state = hierarchy.initial_state(inputs[0].size(0), restarts)
    with torch.device("meta"):
        for given in (None, state):
            y, _ = hierarchy(*inputs, given, restart)
            torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("kind", ["gated_mlp", "mlp", "linear"])
def test_the_way_back_from_the_ball_is_that_of_autograd(kind: str) -> None:
    torch.manual_seed(0)
    net = build_network(kind, False)
    change = tuple(torch.randn(3, *shape, dtype=torch.float64).requires_grad_() for shape in net.shapes(4, 7, 5))
    with torch.no_grad():
        change[0][0] *= 0.1  # inside
        change[0][1] = 0.0
    radius = 0.5
    held = network.shrink(net, change, radius)
    dheld = [torch.randn_like(w) for w in held]
    truth = torch.autograd.grad(held, change, dheld)
    with torch.no_grad():
        scales = network.scales(net, change, radius)
        found = [network.shrink_backward(w, s, d) for w, s, d in zip(held, scales, dheld, strict=True)]
    assert any(bool((s < 1).any()) for s in scales)
    for a, b in zip(truth, found, strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("update", ["gradient", "newton_schulz"])
@pytest.mark.parametrize("radius", [2.0, 0.02])
def test_what_is_not_looked_at_is_the_same_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, radius: float, update: str
) -> None:
    """On a GPU every state is multiplied by what the ball gives, 1 inside, instead of asking whether it lies inside."""
    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    found = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(network, "surely_inside", lambda *_: False)
        case = make_case("gated_mlp", 45, torch.float32)
        y, state = run(chunked, Rule(case.network, 4, update=update, radius=radius), case)
        total = y.square().sum() + sum(w.sum() for w in state.change)
        found.append([y, *state.change, *torch.autograd.grad(total, case.inputs(), allow_unused=True)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("chunks", [1, 2, 16, 50, 200])
def test_root_of_the_states_is_kept(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """64 states of 544 KiB a shard and head were two thirds of what a step kept, however short the shard."""
    monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    case = make_case("linear", 3 * chunks, torch.float32)
    size = (4, 2 * case.initial[0].size(1), case.initial[0].size(2))  # all heads of both sequences, w above s
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape == size) or x, lambda x: x):
        run(chunked, Rule(case.network, 3), case)
    assert 0 < sum(kept) - 1 <= math.isqrt(chunks - 1) + 1, "one is what the scan began with"
