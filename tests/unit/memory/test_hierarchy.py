"""The hierarchy: shards, resets, chunk sizes at run time, documents, Omega windows (M4, M8, M9, M11, M13)."""

import math

import pytest
import torch
from torch.nn import functional as nnf

from atlas_lm.memory import chunked
from atlas_lm.memory.fast_memory import FastMemory
from atlas_lm.memory.hierarchy import Hierarchy
from atlas_lm.memory.network import build_network
from atlas_lm.memory.projection import persistent_state, project
from atlas_lm.memory.state import Gates, Rule, Tokens, initial_state
from tests.support.hierarchy_cases import SPEC, Inputs, make_hierarchy, make_inputs, stream

SHARD = SPEC.shard


@torch.no_grad()
def never_write(memory: FastMemory) -> None:
    """η = 0 for every token: what this memory answers depends on the query alone."""
    heads = memory.heads
    memory.gates.weight[heads : 2 * heads] = 0.0
    memory.gates.bias[heads : 2 * heads] = -math.inf


def local_only(**changes) -> Hierarchy:
    hierarchy = make_hierarchy(SPEC._replace(**changes))
    never_write(hierarchy.global_memory)
    return hierarchy


def requiring_gradient(inputs: Inputs) -> Inputs:
    return Inputs(*(x.clone().requires_grad_() for x in inputs))


def gradient_of(hierarchy: Hierarchy, inputs: Inputs, start: int, end: int, **kwargs) -> Inputs:
    """The gradient of the outputs of tokens [start, end) with respect to everything."""
    inputs = requiring_gradient(inputs)
    hierarchy(*inputs, **kwargs)[0][:, :, start:end].square().sum().backward()
    return Inputs(*(x.grad for x in inputs))


@pytest.mark.parametrize("context", [1, 4])
@pytest.mark.parametrize("update", ["gradient", "newton_schulz"])
def test_no_gradient_crosses_a_shard_border(update, context):
    """Exactly zero through local memories and projection, Omega windows included (M11)."""
    found = gradient_of(local_only(update=update, context=context), make_inputs(63), SHARD, 2 * SHARD)
    for part in (found.cut(0, SHARD), found.cut(2 * SHARD, 63)):
        assert all((g == 0).all() for g in part)
    inside = found.cut(SHARD, SHARD + 3)  # the same shard's first tokens, for comparison
    assert all(g.abs().max() > 0 for g in inside)


def test_the_global_memory_carries_gradient_across_shard_borders():
    found = gradient_of(make_hierarchy(), make_inputs(63), SHARD, 2 * SHARD).cut(0, SHARD)
    assert all(g.abs().max() > 0 for g in (found.x, found.k, found.v))


@pytest.mark.parametrize("context", [1, 4])
@pytest.mark.parametrize("T", [7, 24, 63, 100])
def test_parallel_shards_are_each_shard_alone(T, context):
    hierarchy, inputs = local_only(context=context), make_inputs(T)
    with torch.inference_mode():
        together = hierarchy(*inputs)[0]
        alone = [hierarchy(*inputs.cut(start, min(start + SHARD, T)))[0] for start in range(0, T, SHARD)]
    torch.testing.assert_close(together, torch.cat(alone, dim=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("context", [1, 4])
def test_omega_windows_cross_chunk_borders(context):
    """With no write in the first chunk and its momentum cut off, only a window still sees its tokens (M4)."""
    torch.manual_seed(0)
    C, T, D = 7, 14, 4
    rule = Rule(build_network("linear", False), C, context)
    k, v = nnf.normalize(torch.randn(1, 1, T, D), dim=-1), torch.randn(1, 1, T, D, requires_grad=True)
    ones = torch.ones(1, 1, T)
    eta, theta = ones.clone(), 0.5 * ones
    eta[..., :C] = 0.0
    theta[..., C] = 0.0
    initial = (torch.randn(1, D, D),)
    tokens = Tokens(k, k, v, Gates(ones, eta, theta, ones))
    y, _ = chunked.scan(rule, initial_state(rule, initial, 1, D), initial, k, k, tokens)
    y[:, :, C:].sum().backward()
    seen = v.grad.abs().sum((0, 1, 3)) > 0
    assert seen.tolist() == [C - context < i for i in range(T)]


def test_projection_restarts_from_the_persistent_values_exactly():
    """M9: both M and n, whatever came before."""
    torch.manual_seed(0)
    persistent = persistent_state(torch.randn(2, 64, 4), 3)
    assert (persistent.n > 0).all()
    k = torch.randn(3, 2, 100, 4)
    restart = torch.zeros(3, 2, 100, dtype=torch.bool)
    for last in (0, 63, 64, 99):  # at both ends of the blocks that it is computed in
        k[:, :, last:] = 0.0  # a token without key adds nothing
        restart[:] = False
        restart[:, :, last] = True
        _, state = project(k, k, persistent, persistent, restart)
        assert torch.equal(state.n, persistent.n)
        assert torch.equal(state.M, persistent.M)
        k = torch.randn(3, 2, 100, 4)


def test_every_shard_begins_at_the_persistent_values():
    """The projected query of a shard's first token is (M_persistent + k kᵀ) q, to unit norm."""
    hierarchy, seen = make_hierarchy(), []
    hierarchy.features.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    inputs = make_inputs(63)
    hierarchy(*inputs)
    projected = seen[-1]  # (B·S, H, shard, D)
    M = hierarchy.persistent_keys.mT @ hierarchy.persistent_keys
    for n, start in enumerate(range(0, 63, SHARD)):
        q, k = (x[:, :, start] for x in (inputs.q, inputs.k))
        expected = nnf.normalize((q.unsqueeze(-2) @ M).squeeze(-2) + k * (k * q).sum(-1, keepdim=True), dim=-1)
        found = projected.unflatten(0, (2, -1))[:, n, :, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_persistent_values_follow_the_keys():
    """Derived on use: they cannot go stale (M10)."""
    hierarchy = make_hierarchy()
    with torch.no_grad():
        hierarchy.persistent_keys.mul_(3.0)
    state = hierarchy.initial_state(2).projection
    torch.testing.assert_close(state.n[0], hierarchy.persistent_keys.square().sum((-2, -1)))
    _, after = hierarchy(*make_inputs(20), hierarchy.initial_state(2))
    torch.testing.assert_close(after.projection.n, state.n + 20)  # unit keys


@pytest.mark.parametrize(("shard", "global_chunk"), [(100, 16), (8, 16), (0, 16), (16, 0), (-16, 16)])
def test_shard_must_be_a_multiple_of_the_global_chunk(shard, global_chunk):
    with pytest.raises(ValueError, match=f"shard {shard} and global_chunk {global_chunk}"):
        Hierarchy(SPEC._replace(shard=shard, global_chunk=global_chunk))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"persistent_keys": -1}, "persistent_keys must not be negative, got -1"),
        ({"eta_max": 1.5}, r"eta_max must lie in \(0, 1\], got 1.5"),
        ({"eta_max": 0.0}, r"got 0.0"),
        ({"eta_max": math.nan}, "got nan"),
        ({"half_life": 0.0}, "half_life must be a positive number of tokens, got 0.0"),
        ({"radius": 0.0}, "radius of fast weights must be positive, got 0.0"),
        ({"local_chunks": (3, 0)}, "chunk size must be at least 1, got 0"),
        ({"context": 0}, "Omega context must be at least 1 token, got 0"),
        ({"network": "deep"}, "unknown memory network 'deep'"),
        ({"update": "adam"}, "unknown memory update 'adam'"),
        ({"features": "cubic"}, "unknown features 'cubic'"),
        ({"local_features": "cubic"}, "unknown features 'cubic'"),
        ({"answers": "max"}, "unknown answers 'max'; choose sum or gated"),
        ({"rank": 0}, "rank of a feature sketch must be at least 1, got 0"),
    ],
)
def test_what_no_memory_can_be_built_from(change, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy(SPEC._replace(**change))


@pytest.mark.parametrize("chunks", [(1, 1), (5, 11), (24, 64), (100, 2)])
def test_chunk_sizes_change_at_run_time(chunks):
    """Any size, bitwise a hierarchy that was built with it (M13)."""
    changed, fresh, inputs = make_hierarchy(), make_hierarchy(SPEC._replace(local_chunks=chunks)), make_inputs(63)
    with torch.inference_mode():
        before = changed(*inputs)[0]
        changed.set_local_chunks(chunks)
        assert changed.local_chunks == chunks
        assert torch.equal(changed(*inputs)[0], fresh(*inputs)[0])
        assert not torch.equal(changed(*inputs)[0], before)
        changed.set_local_chunks(SPEC.local_chunks)
        assert torch.equal(changed(*inputs)[0], before)


def test_chunk_sizes_that_cannot_be_set():
    hierarchy = make_hierarchy()
    with pytest.raises(ValueError, match=r"2 local memories, got 1 .*\[4\]"):
        hierarchy.set_local_chunks((4,))
    with pytest.raises(ValueError, match="chunk size must be at least 1, got 0"):
        hierarchy.set_local_chunks((4, 0))


def test_a_stream_must_be_prefilled_again_after_a_change():
    hierarchy, inputs = make_hierarchy(), make_inputs(20)
    state = stream(hierarchy, inputs, [20])[1][-1]
    hierarchy.set_local_chunks((5, 9))
    with pytest.raises(ValueError, match="chunk 5, context 1; prefill again"):
        hierarchy(*inputs, state)


# Documents.


def starts(T: int, *where: int) -> torch.Tensor:
    restart = torch.zeros(2, T, dtype=torch.bool)
    restart[:, list(where)] = True
    return restart


@pytest.mark.parametrize("context", [1, 4])
@pytest.mark.parametrize("update", ["gradient", "newton_schulz"])
@pytest.mark.parametrize("start", [1, 16, 29, 48, 62])  # in the middle of chunks, at a chunk's and at a shard's start
def test_a_document_knows_nothing_of_what_came_before(start, update, context):
    hierarchy = make_hierarchy(SPEC._replace(update=update, context=context))
    inputs, restart = make_inputs(63), starts(63, start)
    other = make_inputs(63, seed=1)
    changed = Inputs(
        *(torch.cat([b[..., :start, :] * 2, a[..., start:, :]], -2) for a, b in zip(inputs, other, strict=True))
    )
    with torch.inference_mode():
        a, b = (hierarchy(*x, restart_BT=restart)[0] for x in (inputs, changed))
    assert (a - b)[:, :, start:].abs().max() <= 1e-12
    assert (a - b)[:, :, :start].abs().max() > 1e-3
    found = gradient_of(hierarchy, inputs, start, 63, restart_BT=restart)
    assert max(g.abs().max() for g in found.cut(0, start)) <= 1e-12


def test_a_document_in_a_stream_knows_nothing_of_what_came_before():
    hierarchy, inputs, other = make_hierarchy(), make_inputs(40), make_inputs(40, seed=1)
    changed = Inputs(*(torch.cat([b[..., :29, :], a[..., 29:, :]], -2) for a, b in zip(inputs, other, strict=True)))
    outputs = []
    with torch.inference_mode():
        for x in (inputs, changed):
            state, pieces = hierarchy.initial_state(2, restart=True), []
            for start, end in ((0, 27), (27, 31), (31, 40)):
                y, state = hierarchy(*x.cut(start, end), state, starts(40, 29)[:, start:end])
                pieces.append(y)
            outputs.append(torch.cat(pieces, dim=2))
    assert (outputs[0] - outputs[1])[:, :, 29:].abs().max() <= 1e-12


def test_document_starts_concern_their_own_sequence():
    hierarchy, inputs = make_hierarchy(), make_inputs(63)
    with torch.inference_mode():
        plain = hierarchy(*inputs)[0]
        torch.testing.assert_close(hierarchy(*inputs, restart_BT=starts(63))[0], plain, rtol=0, atol=1e-12)
        restart = starts(63, 10)
        restart[0] = False
        one = hierarchy(*inputs, restart_BT=restart)[0]
    torch.testing.assert_close(one[0], plain[0], rtol=0, atol=1e-12)
    assert (one[1] - plain[1])[:, 10:].abs().max() > 1e-3


@pytest.mark.parametrize("least", [0.0, 16.0])
def test_half_lives_start_where_they_are_said_to_and_end_at_the_least(least: float) -> None:
    memory = make_hierarchy(SPEC._replace(half_life=512.0, half_life_least=least)).global_memory
    with torch.no_grad():
        memory.gates.weight.zero_()
        alpha = memory.open(torch.zeros(1, 1, SPEC.dim, dtype=torch.float64)).alpha
        torch.testing.assert_close(alpha, torch.full_like(alpha, 2 ** (-1 / 512)))
        memory.gates.bias[: SPEC.heads] = -1e6
        shut = memory.open(torch.zeros(1, 1, SPEC.dim, dtype=torch.float64)).alpha
        torch.testing.assert_close(shut, torch.full_like(shut, 2 ** (-1 / least) if least else 0.0))


@pytest.mark.parametrize(("first", "least"), [(1e12, 0.0), (1e9, 9.99999999e8), (0.01, 0.0), (0.02, 0.01)])
def test_extreme_half_lives_start_finite(first: float, least: float) -> None:
    memory = Hierarchy(SPEC._replace(half_life=first, half_life_least=least)).global_memory
    assert memory.gates.bias.isfinite().all()


@pytest.mark.parametrize("first", [math.inf, 1e17, 1e-4])
def test_half_lives_beyond_all_use_are_refused(first: float) -> None:
    with pytest.raises(ValueError, match="half_life must lie between"):
        Hierarchy(SPEC._replace(half_life=first))


def test_a_sparse_write_gate_can_shut_and_open_wholly() -> None:
    """And a token that it shuts out leaves the memory as it was, exactly."""
    memory = make_hierarchy(SPEC._replace(write_gate="sparse")).global_memory
    x = torch.zeros(1, 3, SPEC.dim, dtype=torch.float64)
    with torch.no_grad():
        memory.gates.weight.zero_()
        for logit, share in ((-3.0, 0.0), (0.0, 0.5), (3.0, 1.0)):
            memory.gates.bias[SPEC.heads : 2 * SPEC.heads] = logit
            eta = memory.open(x).eta
            torch.testing.assert_close(eta, torch.full_like(eta, share), rtol=0, atol=1e-15 if share != 0.5 else 1e-12)
    ordinary = make_hierarchy(SPEC).global_memory
    with torch.no_grad():
        ordinary.gates.weight.zero_()
        ordinary.gates.bias[SPEC.heads : 2 * SPEC.heads] = -3.0
    assert (ordinary.open(x).eta > 0.04).all()


def test_an_unknown_write_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown write_gate 'hard'; choose sigmoid or sparse"):
        Hierarchy(SPEC._replace(write_gate="hard"))


def test_a_weight_norm_begins_with_columns_that_can_hold_a_write() -> None:
    for kind in ("gated_mlp", "mlp", "linear"):
        memory = make_hierarchy(SPEC._replace(network=kind, weight_norm=True, context=1)).global_memory
        columns = torch.cat([torch.linalg.vector_norm(w, dim=-2).flatten() for w in memory.weights()])
        assert (columns > 0.2).all(), kind


def test_a_weight_norm_does_not_go_with_the_delta_rule() -> None:
    spec = SPEC._replace(network="linear", update="delta", context=1, weight_norm=True)
    with pytest.raises(ValueError, match="weight_norm would turn them: set weight_norm: false or update: gradient"):
        Hierarchy(spec)


def test_a_least_half_life_above_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match=r"half_life_least must lie in \[0, half_life\), got 128\.0"):
        Hierarchy(SPEC._replace(half_life=64.0, half_life_least=128.0))


def test_local_memories_of_another_kind() -> None:
    hierarchy = make_hierarchy(
        SPEC._replace(network="linear", update="delta", local_network="gated_mlp", local_update="gradient")
    )
    assert (hierarchy.global_memory.rule.network.kind, hierarchy.global_memory.rule.update) == ("linear", "delta")
    assert {(m.rule.network.kind, m.rule.update) for m in hierarchy.local_memories} == {("gated_mlp", "gradient")}


@pytest.mark.parametrize("chunk", [None, 8])
def test_gates_weigh_what_the_local_memories_answer(chunk) -> None:
    """y = y_global + Σ σ(W x + b) ⊙ y_local, a gate for every local memory, head and token."""
    spec = SPEC._replace(answers="gated", global_chunk=chunk)
    hierarchy, inputs = make_hierarchy(spec), make_inputs(63)
    gates = hierarchy.answer_gates
    torch.nn.init.normal_(gates.weight)
    shares = torch.sigmoid(inputs.x @ gates.weight.mT + gates.bias).mT.unflatten(1, (2, SPEC.heads)).unsqueeze(-1)

    def alone(n: int | None) -> torch.Tensor:
        """What one memory answers; None: the global one."""
        part = make_hierarchy(spec)
        kept = part.local_memories[n] if n is not None else None
        part.answer_gates, part.local_memories = None, torch.nn.ModuleList([] if kept is None else [kept])
        part.global_memory = part.global_memory if n is None else None
        return part(*inputs)[0]

    expected = sum(shares[:, n] * alone(n) for n in range(2)) + (0 if chunk is None else alone(None))
    torch.testing.assert_close(hierarchy(*inputs)[0], expected, rtol=0, atol=1e-12)


def test_local_answers_are_nearly_shut_at_first_and_a_single_memory_has_no_gate() -> None:
    assert Hierarchy(SPEC._replace(answers="gated")).answer_gates.bias.sigmoid().max() < 0.05
    assert Hierarchy(SPEC._replace(answers="gated", global_chunk=None, local_chunks=(3,))).answer_gates is None
    assert Hierarchy(SPEC._replace(answers="gated", local_chunks=())).answer_gates is None
    assert Hierarchy(SPEC).answer_gates is None


def test_local_memories_with_a_feature_map_of_their_own() -> None:
    hierarchy = make_hierarchy(SPEC._replace(local_features="sketch", local_rank=2))
    assert (hierarchy.features.dim_out, hierarchy.local_features.dim_out) == (1 + 4 + 6, 1 + 4 + 2)
    state = hierarchy.initial_state(2)
    assert {x.initial[0].size(-2) for x in hierarchy.local_memories} != {hierarchy.global_memory.initial[0].size(-2)}
    assert hierarchy(*make_inputs(20), state)[0].isfinite().all()
    assert Hierarchy(SPEC._replace(local_features="sketch", local_chunks=())).local_features is None
    alone = Hierarchy(SPEC._replace(local_features="sketch", local_rank=2, global_chunk=None))
    assert (alone.local_features, alone.features.dim_out) == (None, 1 + 4 + 2)


def test_without_the_projection_local_memories_are_asked_as_the_query_comes() -> None:
    """And there are no persistent keys, which nothing would learn."""
    hierarchy, inputs = make_hierarchy(SPEC._replace(projection=False)), make_inputs(SHARD)
    assert hierarchy.persistent_keys.numel() == 0
    assert not hierarchy.persistent_keys.requires_grad
    only = make_hierarchy(SPEC._replace(projection=False, global_chunk=None, local_chunks=(3,)))
    memory = only.local_memories[0]
    tokens = Tokens(inputs.k, only.features(inputs.k), inputs.v, memory.open(inputs.x))
    expected = chunked.scan_shard(memory.rule, memory.weights(), inputs.q, only.features(inputs.q), tokens)
    torch.testing.assert_close(only(*inputs)[0], expected, rtol=0, atol=1e-12)
    projected = make_hierarchy(SPEC._replace(global_chunk=None, local_chunks=(3,)))
    assert (projected(*inputs)[0] - expected).abs().max() > 1e-3
