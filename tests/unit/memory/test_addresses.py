"""Compiled code gets addresses: what does not fit is refused first, and so is a state of another model."""

import pytest
import torch
from torch import Tensor

from atlas_lm.memory.kernels import attention as cpu_attention
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.kernels import features as cpu_features
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.loop.types import ChunkBatch, LoopConfig
from atlas_lm.memory.network import Network
from atlas_lm.model.attention import angles
from atlas_lm.model.norm import RMSNorm, normalised_heads
from tests.support.hierarchy_cases import SPEC, make_hierarchy, make_inputs, stream, tensors
from tests.support.model_cases import build_model, make_tokens
from tests.support.state_pairs import pairs


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    else:
        assert compiled.library() is not None, "no C++ compiler: the compiled code is not tested"


@pytest.mark.long
def test_pairs_of_models_and_states():
    assert "40 pairs" in pairs("40", "0")


# What each function is given.


def chunks(**changes: Tensor | None) -> ChunkBatch:
    """Of G = 4 sequences and heads, K = 3 chunks of C = 5 with a halo of 2, F = 6 features and D = 4 outputs."""
    G, K, C, N, F, D = 4, 3, 5, 7, 6, 4
    sizes = dict(
        phi=(G, K, N, F), v=(G, K, N, D), phi_q=(G, K, C, F), gamma=(G, K, N), decay=(G, K, 2, 2), eta=(G, K),
        write_coef=(G, K, 2, N), token_eta=(G, K, C), intake=(G, K, C), retain=(G, K, C), carry=(G, K, C),
    )  # fmt: skip
    flags = dict(same_segment=(G, K, N, N), in_start_segment=(G, K, N, 1))
    made = {name: torch.rand(*shape) for name, shape in sizes.items()}
    made |= {name: torch.ones(*shape, dtype=torch.bool) for name, shape in flags.items()}
    return ChunkBatch(**(made | changes))


def run_loop(states: tuple = ((4, 12, 10), (4, 10, 4)), initial: tuple = ((2, 6, 10), (2, 5, 4)), **changes) -> None:
    plan = LoopConfig(Network("gated_mlp", False), 3, "gradient", 5, 8.0, torch.float32, complete=3, train=True)
    given = [x if isinstance(x, Tensor) else torch.rand(*x) for x in states]
    cpu_loop.run(plan, given, tuple(torch.rand(*shape) for shape in initial), chunks(**changes))


def test_a_loop_whose_tensors_fit_runs():
    run_loop()
    run_loop(same_segment=None, in_start_segment=None)


@pytest.mark.parametrize("name", ChunkBatch._fields)
@pytest.mark.parametrize("change", ["shorter", "longer", "double", "meta"])
def test_the_loop_refuses_tensors_of_another_size(name, change):
    """One axis of one tensor is another, or its numbers are wider than the others'."""
    x = getattr(chunks(), name)
    changed = {
        "shorter": lambda: x[..., :-1],
        "longer": lambda: torch.cat([x, x], -1),
        "double": lambda: x.to(torch.float64),
        "meta": lambda: x.to("meta"),
    }[change]()
    with pytest.raises((ValueError, RuntimeError), match=r"must be a contiguous CPU tensor|at least 1|cannot run"):
        run_loop(**{name: changed})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": ((4, 12, 10),)}, "before must be 2 tensors, got 1"),
        ({"states": ((4, 12, 8), (4, 8, 4))}, r"before .* \(4, 12, 10\)"),
        ({"states": ((2, 12, 10), (2, 10, 4))}, r"before .* \(4, 12, 10\)"),
        ({"states": (torch.rand(4, 12, 10).double(), torch.rand(4, 10, 4))}, "got .* of torch.float64"),
        ({"states": (torch.rand(4, 12, 10).bfloat16(), torch.rand(4, 10, 4))}, "got .* of torch.bfloat16"),
        ({"initial": ((2, 6, 10),)}, "gated_mlp cannot run with 1 matrices"),
        ({"initial": ((3, 6, 10), (3, 5, 4))}, "3 of 4 heads"),
        ({"initial": ((2, 6, 9), (2, 5, 4))}, r"initial .* \(2, 6, 10\)"),
    ],
)  # fmt: skip
def test_the_loop_refuses_states_and_weights_of_another_network(changes, message):
    with pytest.raises(ValueError, match=message):
        run_loop(**changes)


def attend(T: int = 9, heads: int = 2, window: int = 4, turns: int | None = None, width: int = 8, wide=torch.float32):
    qkv = torch.rand(2, T, 3 * heads * width)
    cos, sin = angles(qkv, turns or T, width, 0, 1e4)
    return cpu_attention.window_attention(qkv, cos.to(wide), sin, heads, window)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": 5}, r"cos must be .* \(9, 4\)"),
        ({"width": 7}, "an even head dim, got 4 and 7"),
        ({"window": 0}, "window of at least 1"),
        ({"wide": torch.float64}, "cos .* of torch.float64"),
    ],
)
def test_attention_refuses_what_does_not_fit(changes, message):
    assert attend().shape == (2, 9, 16)
    with pytest.raises(ValueError, match=message):
        attend(**changes)


def test_attention_refuses_heads_that_do_not_divide():
    qkv = torch.rand(2, 9, 66)
    cos, sin = angles(qkv, 9, 4, 0, 1e4)
    with pytest.raises(ValueError, match="qkv must be"):
        cpu_attention.window_attention(qkv, cos, sin, 5, 4)


@pytest.mark.parametrize(
    ("tail", "weight", "heads"),
    [((2, 2, 48), (4, 48), 2), ((1, 3, 48), (4, 48), 2), ((2, 3, 24), (4, 48), 2), ((2, 3, 48), (4, 24), 2),
     ((2, 3, 48), (4, 48), 5)],
)  # fmt: skip
def test_convolution_refuses_what_does_not_fit(tail, weight, heads):
    x = torch.rand(2, 9, 48)
    assert cpu_convolution.heads(x, torch.rand(2, 3, 48), torch.rand(4, 48), 2)[0].shape == (2, 2, 9, 8)
    with pytest.raises(ValueError, match=r"convolution: .* must be"):
        cpu_convolution.heads(x, torch.rand(*tail), torch.rand(*weight), heads)


@pytest.mark.parametrize("ab", [torch.rand(2, 8, 10), torch.rand(2, 9, 11), torch.rand(2, 9, 10).double()])
def test_sketch_refuses_what_does_not_fit(ab):
    scales = (0.1, 0.2, 0.3)
    assert cpu_features.sketch(torch.rand(2, 9, 4), torch.rand(2, 9, 10), scales).shape == (2, 9, 10)
    with pytest.raises(ValueError, match="sketch: ab must be"):
        cpu_features.sketch(torch.rand(2, 9, 4), ab, scales)


def test_norm_refuses_another_width():
    with pytest.raises(ValueError, match=r"last axis .* 64\) for a norm of \(4,\)"):
        RMSNorm(4)(torch.rand(2, 3, 64))
    with pytest.raises(ValueError, match=r"last axis .* 64\) for a norm of \(4,\)"):
        normalised_heads(RMSNorm(4), torch.rand(2, 3, 5, 64))


def test_views_and_empty_batches_are_read_as_what_they_are():
    torch.manual_seed(0)
    norm = RMSNorm(8)
    x = torch.randn(2, 5, 8)
    turned = torch.view_as_complex(torch.stack([x, x], -1)).conj().imag  # a view with its sign turned
    assert turned.is_neg()
    assert torch.equal(norm(turned), -norm(x))
    assert torch.equal(norm(x.mT.contiguous().mT), norm(x))
    assert torch.equal(norm(torch.cat([x, x], -1)[..., :8]), norm(x))
    assert norm(x[:0]).shape == (0, 5, 8)
    assert norm(x[:, :0]).shape == (2, 0, 8)
    model = build_model(torch.float32)
    assert model(make_tokens(5)[:0]).logits.shape == (0, 5, 11)


# States.


def test_a_state_of_another_precision_is_cast():
    """As after model.bfloat16() or model.double() between two calls; the continuation is that of the precision."""
    tokens = make_tokens(24)
    for before, after in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        model = build_model(before)
        state = model(tokens[:, :11], model.initial_state(2)).state
        model = model.to(after)
        logits = model(tokens[:, 11:], state).logits
        assert logits.dtype == after
        assert (logits - model(tokens).logits[:, 11:]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_streams(dtype, path):
    """Its fast weights and their sums stay wide: the state keeps its size from the first call on."""
    model = build_model(torch.float32).to(dtype)
    tokens = make_tokens(24)
    state = model.initial_state(2)
    after = model(tokens[:, :11], state).state
    assert [x.dtype for x in tensors(after)] == [x.dtype for x in tensors(state)]
    logits = torch.cat([model(tokens[:, :11], state).logits, model(tokens[:, 11:], after).logits], 1)
    expected = model(tokens).logits
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 6}, r"change is \(2, 2, 11, 10\), .* \(2, 2, 11, 12\) \(batch, heads, features or hidden"),
        ({"network": "linear"}, "network .*gated_mlp.* instead of .*linear"),
        ({"network": "mlp", "hidden": 10}, "network .*gated_mlp.* instead of .*mlp"),
        ({"rank": 7}, "features"),
        ({"context": 2}, "context 1 instead of 2"),
        ({"update": "newton_schulz"}, "update gradient instead of newton_schulz"),
        ({"radius": 2.0}, "radius 8.0 instead of 2.0"),
        ({"local_chunks": (3,)}, "2 local memories, this model 1"),
        ({"local_chunks": (7, 3)}, "chunk 3 instead of 7"),
        ({"global_chunk": 12}, "chunk 8 instead of 12"),
    ],
)
def test_a_state_of_another_memory_is_refused(change, message, path):
    inputs = make_inputs(10)
    state = stream(make_hierarchy(), inputs, [10])[1][-1]
    with pytest.raises(ValueError, match=message):
        make_hierarchy(SPEC._replace(**change))(*inputs, state)


def test_a_state_of_another_batch_or_kind_is_refused(path):
    hierarchy, inputs = make_hierarchy(), make_inputs(10)
    with pytest.raises(ValueError, match=r"is \(3, 2, .* need \(2, 2, .* \(batch, heads"):
        hierarchy(*inputs, hierarchy.initial_state(3))
    with pytest.raises(ValueError, match="made with document starts, these tokens come without"):
        hierarchy(*inputs, hierarchy.initial_state(2, restart=True))
    with pytest.raises(ValueError, match="made without document starts, these tokens come with"):
        hierarchy(*inputs, hierarchy.initial_state(2), torch.zeros(2, 10, dtype=torch.bool))
    state = hierarchy.initial_state(2)
    memory = state.global_memory
    with pytest.raises(ValueError, match=r"numbers of torch.int64"):
        hierarchy(*inputs, state._replace(global_memory=memory._replace(change=tuple(w.long() for w in memory.change))))
    with pytest.raises(ValueError, match="lies on meta"):
        hierarchy(*inputs, state._replace(projection=state.projection._replace(n=state.projection.n.to("meta"))))
    with pytest.raises(ValueError, match="holds 8 tokens of 8"):
        hierarchy(*inputs, state._replace(global_memory=memory._replace(filled=8)))
    with pytest.raises(ValueError, match="has 1 fast matrices"):
        hierarchy(*inputs, state._replace(global_memory=memory._replace(change=memory.change[:1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "2 layers, the model 3"),
        ({"heads": 3}, "keys of the attention is"),
        ({"window": 6}, "keys of the attention is .*window - 1"),
        ({"conv": 3}, "tail of the convolution is"),
        ({"memory": "none"}, "the state has a memory, the model has none"),
        ({"memory": "gated_delta"}, "the state has a memory, the model has a gated delta net"),
        ({"share_qkv": True}, "differ in share_qkv"),
        ({"attention_conv": 3}, "model's attention has a convolution, the state's has none"),
        ({"global_chunk": None}, "the state has a global memory, the model has none"),
        ({"rope_base": 500.0}, "rope_base 10000.0, this model's are by 500.0"),
    ],
)
def test_a_state_of_another_model_is_refused(change, message, path):
    model, tokens = build_model(), make_tokens(10)
    state = model(tokens, model.initial_state(2)).state
    with pytest.raises(ValueError, match=message):
        build_model(**change)(tokens, state)
