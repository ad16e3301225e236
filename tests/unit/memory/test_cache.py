"""Cached states of past shards: the equations token by token, restarts, freezing, and what they are for."""

from itertools import pairwise

import pytest
import torch

from atlas_lm.memory import cache, chunked, reference
from atlas_lm.memory.cache import Asked, empty_cache
from atlas_lm.memory.hierarchy import Hierarchy
from atlas_lm.memory.state import Rule, initial_state, map_tokens
from tests.support.hierarchy_cases import SPEC, make_hierarchy, make_inputs, stream
from tests.support.memory_cases import Case, make_case, relative_errors
from tests.support.model_cases import build, make_tokens
from tests.support.pairwise import every_pair

SHARD, T = 24, 100


def asked_of(case: Case) -> Asked:
    generator = torch.Generator().manual_seed(3)
    B, H, T, D = case.q.shape
    key = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64)
    present = torch.randn(B, H, T, generator=generator, dtype=torch.float64)
    return Asked(key.requires_grad_(), present.requires_grad_())


def fast(rule: Rule, keep: int, case: Case, asked: Asked, cuts: tuple[int, ...] = ()) -> torch.Tensor:
    """As `reference.cached`, in pieces that end at `cuts`."""
    tokens, phi_q = case.tokens._replace(phi=case.features(case.tokens.k)), case.features(case.q)
    B = case.q.size(0)
    state = initial_state(rule, case.initial, B, phi_q.size(-1), tokens.restart is not None)
    kept, outputs = empty_cache(case.initial, B, keep), []
    for i, j in pairwise([0, *cuts, T]):
        here = slice(i, j)
        piece = map_tokens(lambda x, here=here: x[:, :, here], tokens)
        y, state, kept = cache.scan(
            chunked.scan, rule, SHARD, state, kept, case.initial, case.q[:, :, here], phi_q[:, :, here], piece,
            asked.part(here),
        )  # fmt: skip
        outputs.append(y)
    assert kept.seen == T % SHARD
    assert kept.used == min(keep, T // SHARD)
    return torch.cat(outputs, dim=2)


@every_pair(
    rule=[("gated_mlp", "gradient"), ("mlp", "newton_schulz"), ("linear", "gradient"), ("linear", "delta")],
    keep=[1, 2, 9],
    restarts=[(), (5, 48, 80)],  # inside a shard, at its start, and inside the one that is cut
    cuts=[(), (24,), (7, 8, 50, 99)],
    read=["token", "chunk"],
)
def test_shards_at_once_are_tokens_one_by_one(rule, keep, restarts, cuts, read):
    """Outputs and every gradient, of what the hidden states ask as well."""
    kind, update = rule
    case = make_case(kind, T, eta_max=1.0 if update != "newton_schulz" else 0.01, restarts=restarts)
    rule, asked = Rule(case.network, 8, 1, update, read, radius=2.0), asked_of(case)
    tokens, phi_q = case.tokens._replace(phi=case.features(case.tokens.k)), case.features(case.q)
    truth = reference.cached(rule, SHARD, keep, case.initial, case.q, phi_q, tokens, asked)
    ours = fast(rule, keep, case, asked, cuts)
    assert max(relative_errors([truth], [ours])) <= 1e-9
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [*case.inputs(), *asked]
    both = [torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True) for y in (truth, ours)]
    for a, b, x in zip(*both, inputs, strict=True):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        assert max(relative_errors([a], [b])) <= 1e-9


SPEC_CACHED = SPEC._replace(cached_states=2)


def test_a_restart_hides_what_was_kept_before_it_exactly() -> None:
    hierarchy, inputs = make_hierarchy(SPEC_CACHED), make_inputs(T)
    restart = torch.zeros(2, T, dtype=torch.bool)
    restart[:, 60] = True
    with torch.no_grad():
        truth = hierarchy(*inputs, restart_BT=restart)[0]
        y = hierarchy(*inputs.changed(10), restart_BT=restart)[0]
        assert torch.equal(y[:, :, 60:], truth[:, :, 60:])
        assert not torch.equal(y[:, :, 50:60], truth[:, :, 50:60])
        assert not torch.equal(hierarchy(*inputs)[0][:, :, 60:], truth[:, :, 60:])


def test_a_stream_that_does_not_write_keeps_nothing() -> None:
    hierarchy, inputs = make_hierarchy(SPEC_CACHED), make_inputs(T)
    before = stream(hierarchy, inputs.cut(0, 30), [30])[1][0]
    _, after = hierarchy(*inputs.cut(30, T), before, write=False)
    assert after.cache.used == before.cache.used == 1
    for old, new in zip(before.cache.snapshots.change, after.cache.snapshots.change, strict=True):
        assert torch.equal(old, new)
    assert torch.equal(before.cache.key_sum, after.cache.key_sum)
    _, learned = hierarchy(*inputs.cut(30, T), before)
    assert learned.cache.used == 2


@pytest.mark.parametrize("keep", [0, 4])
def test_what_the_memory_has_forgotten_is_found_where_it_was_kept(keep: int) -> None:
    """The pairs of the first shard, after three shards with a half-life of 4 tokens."""
    torch.manual_seed(0)
    D, shard = 16, 64
    spec = SPEC._replace(
        head_dim=D, heads=1, network="linear", update="delta", features="quadratic", shard=shard, global_chunk=32,
        local_chunks=(), half_life=1e9, cached_states=keep,
    )  # fmt: skip
    hierarchy = Hierarchy(spec).double()
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 1, 4 * shard, D).double(), dim=-1) for _ in range(3))
    x = torch.zeros(1, 4 * shard, spec.dim).double()
    x[:, shard:, 0] = 1.0  # hidden states by which the gates tell the first shard from the rest
    with torch.no_grad():
        memory = hierarchy.global_memory
        memory.gates.weight.zero_()
        memory.gates.bias[0] = 20.0
        memory.gates.weight[0, 0] = -20.0 + 1.67  # α of half a life of 4 tokens from then on
        if keep:
            hierarchy.cache_gates.weight.zero_()
            hierarchy.cache_gates.bias[:D] = 30.0 * k[0, 0, :shard].mean(0) / k[0, 0, :shard].mean(0).norm() ** 2
            hierarchy.cache_gates.bias[D:] = 0.0
        q[:, :, -shard:] = k[:, :, :shard]
        y = hierarchy(x, q, k, v)[0]
    found = torch.nn.functional.cosine_similarity(y[:, :, -shard:], v[:, :, :shard], dim=-1).mean()
    assert (found > 0.8) if keep else (found < 0.2), found


def test_a_saved_session_goes_on_bit_for_bit_and_a_fork_keeps_its_own(tmp_path) -> None:
    model = build(cached_states=2, shard=8, global_chunk=8).eval()
    tokens = make_tokens(61)
    session = model.stream(2)
    session.read(tokens[:, :29])
    session.save(tmp_path / "state.pt")
    fork = session.fork()
    truth = session.read(tokens[:, 29:])
    assert torch.equal(type(session).load(model, tmp_path / "state.pt").read(tokens[:, 29:]), truth)
    fork.read(make_tokens(9, seed=5))
    fork.read(tokens[:, 29:])
    assert not torch.equal(fork.state[0].memory.cache.snapshots.key, session.state[0].memory.cache.snapshots.key)


def test_they_belong_to_a_global_memory() -> None:
    with pytest.raises(ValueError, match=r"cached_states=2 .* set cached_states: 0 or a global_chunk"):
        Hierarchy(SPEC_CACHED._replace(global_chunk=None))


def test_a_state_of_a_model_that_keeps_others_is_refused() -> None:
    inputs, with_two, without = make_inputs(30), make_hierarchy(SPEC_CACHED), make_hierarchy()
    with_three = make_hierarchy(SPEC_CACHED._replace(cached_states=3))
    linear = make_hierarchy(SPEC_CACHED._replace(network="linear"))
    for ours, theirs, message in (
        (with_two, without, "the state has no cached states, the model has"),
        (without, with_two, "the state has cached states, the model has none"),
        (with_two, with_three, "the state does not fit: its kept states"),
        (with_two, linear, "the kept states have 1 fast matrices, the network 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(*inputs, theirs.initial_state(2))
