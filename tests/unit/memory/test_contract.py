"""The behaviour contract of every memory variant and of the whole model, at awkward sizes (M17)."""

from itertools import combinations, product

import pytest
import torch

from atlas_lm.memory import chunked
from atlas_lm.memory.hierarchy import Hierarchy
from atlas_lm.memory.kernels import attention as cpu_attention
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.kernels import delta as cpu_delta
from atlas_lm.memory.kernels import features as cpu_features
from atlas_lm.memory.kernels import norm as cpu_norm
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.model import attention
from atlas_lm.model.block import FUSIONS
from tests.support.hierarchy_cases import (
    LENGTHS,
    SPEC,
    assert_unchanged,
    everything_in,
    held_by,
    make_hierarchy,
    make_inputs,
    size_of,
    stream,
)
from tests.support.model_cases import VOCABULARY, build_model, make_tokens, stream_model
from tests.support.pairwise import every_pair

FACTORS = {
    "network": ("gated_mlp", "mlp", "linear"),
    "features": ("linear", "quadratic", "sketch"),
    "update": ("gradient", "newton_schulz"),
    "context": (1, 4),
}
VARIANTS = (
    ("gated_mlp", "linear", "newton_schulz", 4),
    ("gated_mlp", "quadratic", "gradient", 1),
    ("gated_mlp", "sketch", "gradient", 4),
    ("mlp", "linear", "gradient", 1),
    ("mlp", "quadratic", "newton_schulz", 4),
    ("mlp", "sketch", "newton_schulz", 1),
    ("linear", "linear", "gradient", 4),
    ("linear", "quadratic", "newton_schulz", 1),
    ("linear", "sketch", "gradient", 1),
    ("linear", "sketch", "delta", 1),
    ("linear", "linear", "delta", 1),
)
EXACT = 1e-12
STREAMED = 1e-9  # Newton–Schulz multiplies rounding errors by up to 490 a step
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))


def build(variant, dtype=torch.float64) -> Hierarchy:
    network, features, update, context = variant
    spec = SPEC._replace(network=network, features=features, update=update, context=context)
    # strong Newton–Schulz writes amplify rounding: the forms are compared where it does not
    return make_hierarchy(spec._replace(eta_max=0.05 if update == "newton_schulz" else 1.0), dtype)


def test_variants_cover_every_pair():
    columns = list(zip(*VARIANTS, strict=True))
    for (i, a), (j, b) in combinations(enumerate(FACTORS.values()), 2):
        assert set(zip(columns[i], columns[j], strict=True)) >= set(product(a, b))


@every_variant
@pytest.mark.parametrize("T", LENGTHS)
def test_causal(variant, T):
    hierarchy, inputs = build(variant), make_inputs(T)
    with torch.inference_mode():
        truth = hierarchy(*inputs)[0]
        for t in sorted({0, 1, 5, 23, 24, 25, T // 2, T - 1} & set(range(T))):
            other = hierarchy(*inputs.changed(t))[0]
            assert (other - truth)[:, :, :t].abs().sum() <= EXACT
            empty = bool((truth[:, :, t] == 0).all())  # nothing is read from a linear memory's first chunk
            assert empty or (other - truth)[:, :, t].abs().max() > 1e-6


@every_variant
@pytest.mark.parametrize("T", LENGTHS)
def test_rows_are_independent_and_nothing_is_changed(variant, T):
    hierarchy, inputs = build(variant), make_inputs(T, batch=3)
    before = everything_in(hierarchy)
    y = hierarchy(*inputs)[0]
    assert_unchanged(hierarchy, before)
    others = make_inputs(T, seed=1, batch=3)
    mixed = type(inputs)(*(torch.cat([a[:1], b[1:2] * 3, a[2:]]) for a, b in zip(inputs, others, strict=True)))
    assert (hierarchy(*mixed)[0] - y)[[0, 2]].abs().max() <= EXACT
    alone = type(inputs)(*(a[:1] for a in inputs))
    assert (hierarchy(*alone)[0] - y[:1]).abs().max() <= STREAMED


@every_variant
def test_evaluation_is_training_bitwise(variant):
    """Parallel and streaming, float32: the memory learns whatever the mode."""
    hierarchy, inputs = build(variant, torch.float32), make_inputs(63, dtype=torch.float32)

    def outputs():
        return hierarchy(*inputs)[0], stream(hierarchy, inputs, [20, 21, 63])[0]

    training = [y.detach() for y in outputs()]
    hierarchy.eval()
    evaluation = outputs()
    with torch.no_grad():
        no_gradient = outputs()
    with torch.inference_mode():
        inference = outputs()
    for other in (evaluation, no_gradient, inference):
        assert all(torch.equal(a, b) for a, b in zip(training, other, strict=True))


# Every position in chunks of 3, and most in those of 7 and 8; all splits are slow
every_split = pytest.mark.parametrize(
    "splits",
    [(*range(1, SPEC.shard, 5), SPEC.shard - 1), pytest.param(range(1, SPEC.shard), marks=pytest.mark.slow)],
    ids=["six splits", "every split"],
)


@every_variant
@every_split
def test_a_stream_is_the_parallel_forward_from_any_split(variant, splits):
    """Inside one shard; any split point lies in the middle of some chunk (M14)."""
    hierarchy, inputs = build(variant), make_inputs(SPEC.shard)
    T = SPEC.shard
    with torch.inference_mode():
        truth = hierarchy(*inputs)[0]
        for split in splits:
            for pieces in ([split, T], list(range(split, T + 1))):  # then the rest at once, or token by token
                assert (stream(hierarchy, inputs, pieces)[0] - truth).abs().max() <= STREAMED


@every_variant
def test_a_long_stream_is_one_call_and_its_state_does_not_grow(variant):
    """Across shard lengths: a stream knows none."""
    hierarchy, inputs = build(variant), make_inputs(100)
    with torch.inference_mode():
        truth = stream(hierarchy, inputs, [100])[0]
        y, states = stream(hierarchy, inputs, [37, *range(38, 101)])
    assert (y - truth).abs().max() <= STREAMED
    assert len({size_of(state) for state in [hierarchy.initial_state(2), *states]}) == 1
    # while decoding no state is a view of something that grows
    bound = 2 * size_of(states[0])
    assert max(held_by(state) for state in states[1:]) <= bound


@every_variant
def test_every_parameter_learns(variant):
    """In every head, every gate: the outer gradient passes through the memory's own writes."""
    hierarchy = build(variant)
    hierarchy(*make_inputs(63))[0].square().sum().backward()
    parameters = dict(hierarchy.named_parameters())
    assert {"persistent_keys", "global_memory.initial.0", "local_memories.1.gates.bias"} <= set(parameters)
    silent = [
        name for name, p in parameters.items() if p.grad is None or (p.grad.reshape(len(p), -1) == 0).all(1).any()
    ]
    assert silent == []


# The whole model.

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
MODELS = [{"fusion": fusion} for fusion in FUSIONS] + [
    {"memory": "none"}, {"update": "newton_schulz", "eta_max": 0.05}, {"window": 1, "conv": 1}, {"local_chunks": []},
    {"reset_at_document": True},
    {"global_chunk": None, "share_qkv": True},
    {"global_chunk": None, "local_chunks": [5], "network": "linear", "update": "delta", "context": 1,
     "attention_conv": 4, "share_qkv": True},
    {"memory_layers": [1], "half_life_least": 16.0, "local_network": "linear", "attention_conv": 3},
    {"network": "linear", "update": "delta", "context": 1, "local_network": "gated_mlp", "local_update": "gradient"},
    {"answers": "gated", "local_features": "linear", "momentum": False},
    {"projection": False, "share_qkv": True},
    {"cached_states": 2, "answers": "gated"},
    {"cached_states": 1, "local_chunks": [], "network": "linear", "update": "delta", "context": 1, "share_qkv": True},
    {"write_gate": "sparse", "weight_norm": True, "memory_heads": 1, "memory_hidden": 8, "momentum": False},
    {"global_chunk": None, "local_features": "sketch", "local_rank": 3, "answers": "gated"},
    {"answers": "gated", "local_features": "sketch", "local_rank": 3, "network": "linear", "update": "delta",
     "local_update": "gradient", "context": 1, "attention_conv": 4, "share_qkv": True, "memory_layers": [1]},
]  # fmt: skip
every_model = pytest.mark.parametrize("changes", MODELS, ids=str)


@every_model
@pytest.mark.parametrize("T", LENGTHS)
def test_model_is_causal(changes, T):
    model, tokens = build_model(**changes), make_tokens(T)
    with torch.inference_mode():
        truth = model(tokens).logits
        for t in sorted({0, 6, 24, T - 1} & set(range(T))):
            other = tokens.clone()
            other[:, t] = (other[:, t] + 1) % VOCABULARY
            moved = (model(other).logits - truth).abs()
            assert moved[:, :t].sum() <= EXACT
            assert moved[:, t].max() > 1e-6


PATHS = ["compiled", "torch"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Both ways through the model on a CPU; a GPU takes the second."""
    if request.param == "torch":
        for module in (cpu_attention, cpu_convolution, cpu_delta, cpu_features, cpu_loop):
            monkeypatch.setattr(module, "can_run", lambda *_: False)
        monkeypatch.setattr(cpu_norm, "can_run", lambda *_: False)
    else:
        assert compiled.library() is not None, "no C++ compiler: the compiled code is not tested"


@every_pair(changes=MODELS, sizes=[{}, {"global_chunk": 96, "shard": 192, "local_chunks": [16, 7]}], path=PATHS)
def test_float32_model_is_bitwise_causal(changes, sizes, path):
    """A later token leaves not even its rounding after, in its own block of the projection or another."""
    model, tokens = build_model(torch.float32, **(sizes | changes)), make_tokens(150)
    with torch.inference_mode():
        truth = model(tokens).logits
        for t in (6, 24, 63, 64, 100, 149):
            other = tokens.clone()
            other[:, t] = (other[:, t] + 1) % VOCABULARY
            assert torch.equal(model(other).logits[:, :t], truth[:, :t])


@every_model
@pytest.mark.parametrize("T", LENGTHS)
def test_rows_of_the_model_are_independent_and_nothing_is_changed(changes, T):
    model, tokens = build_model(**changes), make_tokens(T, batch=3)
    before = everything_in(model)
    truth = model(tokens).logits
    assert_unchanged(model, before)
    other = tokens.clone()
    other[1] = (other[1] + 1) % VOCABULARY
    assert (model(other).logits - truth)[[0, 2]].abs().max() <= EXACT


@every_model
def test_every_parameter_of_the_model_gets_a_gradient(changes):
    """One without has no optimizer state, which a rollback or a sharded checkpoint would look for in vain."""
    model, tokens = build_model(**changes), make_tokens(63)
    output = model(tokens)
    (output.logits.square().mean() + sum(gate.mean() for gate in output.gates)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_model
def test_model_evaluates_as_it_trains_bitwise(changes):
    model, tokens = build_model(torch.float32, **changes), make_tokens(63)

    def logits():
        return model(tokens).logits, stream_model(model, tokens, [20, 21, 63])[0]

    training = [y.detach() for y in logits()]
    model.eval()
    with torch.inference_mode():
        inference = logits()
    assert all(torch.equal(a, b) for a, b in zip(training, logits(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(training, inference, strict=True))


@every_model
@every_split
def test_model_streams_what_it_computes_in_parallel(changes, splits):
    model, tokens = build_model(**changes), make_tokens(24)
    with torch.inference_mode():
        truth = model(tokens).logits
        for split in splits:
            for pieces in ([split, 24], list(range(split, 25))):
                assert (stream_model(model, tokens, pieces)[0] - truth).abs().max() <= STREAMED


@every_model
def test_the_model_s_state_does_not_grow(changes):
    model, tokens = build_model(**changes), make_tokens(100)
    with torch.inference_mode():
        whole = stream_model(model, tokens, [100])[0]
        logits, states = stream_model(model, tokens, [37, *range(38, 101)])
    assert (logits - whole).abs().max() <= STREAMED
    assert len({size_of(state) for state in [model.initial_state(2), *states]}) == 1
    assert max(held_by(state) for state in states[1:]) <= 3 * size_of(states[0])


@every_model
def test_every_parameter_of_the_model_learns(changes):
    model, tokens = build_model(**changes), make_tokens(63)
    torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # persistent keys serve the projection, which local memories alone are read through
    projects = changes.get("local_chunks") != [] and changes.get("projection", True)
    assert silent == (set() if projects else {f"blocks.{i}.memory.hierarchy.persistent_keys" for i in range(2)})


@every_fusion
def test_the_gate_depends_on_the_memory_alone_and_zero_takes_it_out(fusion):
    """M12: a gate of 0 leaves nothing of the memory; multiplicative forms then leave nothing at all."""
    torch.manual_seed(0)
    layer = build_model(fusion=fusion).blocks[0].fusion
    attended, remembered = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        if fusion == "normalised_product":
            remembered = torch.full_like(remembered, -1e6)
        else:
            layer.gate.weight.zero_()
            layer.gate.bias.fill_(-1e6)
        fused, gate = layer(attended, remembered)
    assert (gate == 0).all()
    assert torch.equal(fused, attended if fusion == "convex" else torch.zeros_like(attended))


# What is not finite.


@every_pair(
    changes=MODELS,
    where=["qkv", "attention values", "memory values", "stream"],
    value=[torch.nan, torch.inf],
    path=PATHS,
    looks=[True, False],
)
def test_what_is_not_finite_reaches_no_earlier_token(changes, where, value, path, looks, monkeypatch):
    """Bitwise: 0 · NaN in a masked product is NaN. With a look at the outputs, and without one as on a GPU."""
    for room in (chunked, attention):
        monkeypatch.setattr(room, "may_look", lambda _: looks)
    model, tokens = build_model(torch.float32, **changes), make_tokens(100)
    block = model.blocks[0]
    if where == "memory values" and (block.memory is None or block.memory.qkv is None):
        pytest.skip("no memory, or none with values of its own")
    t = 40

    def spoil(module, inputs, output):
        if output.size(1) <= t:
            return output
        channels = slice(None) if where in ("qkv", "stream") else slice(output.size(-1) * 2 // 3, None)
        output = output.clone()
        output[1, t, channels] = value
        return output

    def forward():
        if where == "stream":
            return model(tokens, model.initial_state(2)).logits
        return model(tokens).logits

    projection = block.memory.qkv if where == "memory values" else block.attention.qkv
    with torch.inference_mode():
        truth = forward()
        hook = (block.norm if where in ("qkv", "stream") else projection).register_forward_hook(spoil)
        logits = forward()
        hook.remove()
    assert torch.equal(logits[0], truth[0])
    assert torch.equal(logits[1, :t], truth[1, :t])
    assert not logits[1, t:].isfinite().all()
