"""The chunked form against the reference, one token at a time: outputs, final state and every gradient (M7).

The fast suite has each pair of parameter values; `-m "slow or not slow"` has them all.
"""

import pytest
import torch

from atlas_lm.memory import chunked, hierarchy, network, projection, reference
from atlas_lm.memory.kernels import compiled
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.memory.state import Rule
from tests.support.hierarchy_cases import SPEC, Inputs, make_hierarchy, make_inputs
from tests.support.memory_cases import everything, gradients, make_case, relative_errors, run
from tests.support.pairwise import every_pair

WHOLE = 0  # a chunk as long as the sequence
CHUNKS = (1, 2, 7, 16, 32, 64, WHOLE)
KINDS = ("gated_mlp", "mlp", "linear")
UPDATES = ("gradient", "newton_schulz")
READS = ("token", "chunk")
PATHS = ("compiled", "torch")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Both ways that the loop over chunks can take on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    else:
        assert compiled.library() is not None, "no C++ compiler: the compiled loop is not tested"


def rule_of(case, T: int, chunk: int, context: int, update: str, read: str = "token") -> Rule:
    return Rule(case.network, chunk or T, context, update, read, radius=2.0)


def compare(case, rule, tolerance: float, cuts: tuple[int, ...] = ()) -> None:
    truth, fast = run(reference, rule, case), run(chunked, rule, case, cuts)
    assert max(relative_errors(everything(truth), everything(fast))) <= tolerance
    assert max(relative_errors(gradients(truth, case), gradients(fast, case))) <= tolerance


# Newton–Schulz multiplies a relative error of small singular values by up to 3.4445⁵ ≈ 490 a step, so that two exact
# programs drift apart where writes are strong: the forms are compared where the update does not amplify rounding.
ETA = {"gradient": 1.0, "newton_schulz": 0.01}


@every_pair(
    T=[1, 7, 63, 100, 2000],
    chunk=CHUNKS,
    context=[1, 4, 20],  # 20 reaches back over more than one chunk of 7 or 16
    update=UPDATES,
    path=PATHS,
    slow=lambda T, **_: T == 2000,
)
def test_chunked_equals_reference(T, chunk, context, update, path):
    case = make_case("gated_mlp", T, eta_max=ETA[update])
    compare(case, rule_of(case, T, chunk, context, update), 1e-9)


@every_pair(chunk=[1, 7, 32], kind=KINDS, read=READS, path=PATHS)
def test_every_network_and_read(kind, chunk, read, path):
    case = make_case(kind, 63)
    compare(case, rule_of(case, 63, chunk, 4, "gradient", read), 1e-9)


@every_pair(chunk=[1, 7, 16], kind=KINDS, context=[1, 4], update=UPDATES, read=READS, path=PATHS)
def test_without_momentum(chunk, kind, context, update, read, path):
    """It is θ = 0 at every token, whatever the gates say, and half of the state."""
    case = make_case(kind, 63, eta_max=ETA[update])
    rule = rule_of(case, 63, chunk, context, update, read)
    compare(case, rule._replace(momentum=False), 1e-9)
    compare(case, rule._replace(momentum=False), 1e-9, cuts=(5, 40))
    none = case._replace(
        tokens=case.tokens._replace(gates=case.tokens.gates._replace(theta=0 * case.tokens.gates.theta))
    )
    y, state = run(chunked, rule._replace(momentum=False), case)
    truth, with_it = run(chunked, rule, none)
    assert torch.equal(y, truth)
    assert state.momentum == ()
    assert all(map(torch.equal, state.change, with_it.change))


@every_pair(chunk=[1, 7, 16], update=UPDATES, read=READS, path=PATHS)
def test_on_the_ball(chunk, update, read, path):
    """Where the radius holds W − W_init back, its projection is part of the gradient."""
    case = make_case("gated_mlp", 63, eta_max=ETA[update])
    radius = 0.02 if update == "gradient" else 0.002
    rule = rule_of(case, 63, chunk, 1, update, read)._replace(radius=radius)
    sizes = torch.cat(network.sizes(case.network, run(chunked, rule, case)[1].change), dim=-1)
    assert (sizes > radius * 0.999).any(), "the ball is never reached"
    compare(case, rule, 1e-9)


@every_pair(chunk=[1, 7, 16, 64], kind=KINDS, context=[1, 4], update=UPDATES, read=READS, path=PATHS)
def test_weight_norm(chunk, kind, context, update, read, path):
    """Every column of W is as long as that of W_init after each chunk, wherever calls are cut or documents start."""
    case = make_case(kind, 63, eta_max=ETA[update], restarts=(3, 5, 40))
    rule = rule_of(case, 63, chunk, context, update, read)._replace(weight_norm=True)
    compare(case, rule, 1e-9)
    compare(case, rule, 1e-9, cuts=(5, 40))
    state = run(chunked, rule, case)[1]
    for start, change in zip(case.initial, state.change, strict=True):
        lengths = torch.linalg.vector_norm(start + change, dim=-2)
        assert torch.allclose(lengths, torch.linalg.vector_norm(start, dim=-2).expand_as(lengths), rtol=1e-12)
    if chunk == 7 and update == "gradient":  # and without it is not
        free = run(chunked, rule._replace(weight_norm=False), case)[1].change[0]
        assert not torch.allclose(free, state.change[0], rtol=1e-3)


@every_pair(chunk=[1, 7, 16, 64], update=UPDATES, read=READS, path=PATHS)
def test_restarts_inside_chunks(chunk, update, read, path):
    case = make_case("gated_mlp", 63, eta_max=ETA[update], restarts=(3, 5, 40))
    compare(case, rule_of(case, 63, chunk, 4, update, read), 1e-9)


@every_pair(name=["alpha", "eta", "theta", "gamma"], chunk=[7, 32], read=READS, gate=[0.0, 1e-13, 1e-6], path=PATHS)
def test_gates_that_are_closed_or_nearly(name, chunk, read, gate, path):
    """A gate of 0 still has a gradient, through products in which it is the only zero and those with a second one."""
    case = make_case("gated_mlp", 63)
    x = getattr(case.tokens.gates, name)
    with torch.no_grad():
        x[..., [3, 4, 11, 30, 62]] = gate
    compare(case, rule_of(case, 63, chunk, 4, "gradient", read), 1e-9)


@every_pair(cuts=[(1,), (20, 21), (7, 14, 50)], update=UPDATES, path=PATHS)
def test_pieces_equal_one_call(cuts, update, path):
    """A stream may be cut anywhere, also in the middle of a chunk (M14)."""
    case = make_case("gated_mlp", 63, eta_max=ETA[update])
    compare(case, rule_of(case, 63, 7, 4, update), 1e-9, cuts)


@every_pair(T=[1, 7, 63, 100], chunk=CHUNKS, path=PATHS)
def test_float32(T, chunk, path):
    case = make_case("gated_mlp", T, dtype=torch.float32)
    compare(case, rule_of(case, T, chunk, 4, "gradient"), 1e-4)


@every_pair(T=[1, 7, 63, 100, 200], restarts=[(), (0, 70)], persistent_keys=[0, 5])
def test_projection_equals_reference(T, restarts, persistent_keys):
    """Q–K projection in blocks against TNT eq 13–15 token by token, with and without persistent keys (M9)."""
    torch.manual_seed(0)
    keys = torch.randn(2, persistent_keys, 4, dtype=torch.float64, requires_grad=True)
    q, k = (torch.randn(3, 2, T, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    restart = None
    if restarts:
        restart = torch.zeros(3, 2, T, dtype=torch.bool)
        restart[1, :, [t for t in restarts if t < T]] = True  # in one sequence of the batch only
    results = []
    for form in (reference, projection):
        persistent = projection.persistent_state(keys, 3)
        y, state = form.project(q, k, persistent, persistent, restart)
        total = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + state.M.square().sum() + state.n.sum()
        results.append([y, *state, *torch.autograd.grad(total, [q, k, keys])])
    assert max(relative_errors(*results)) <= 1e-9


@every_pair(T=[1, 7, 63, 100], context=[1, 4], persistent_keys=[0, 3], update=UPDATES)
def test_whole_hierarchy_equals_reference(T, context, persistent_keys, update, monkeypatch):
    """Global and local memories, shards, Q–K projection, features and gates: outputs and every gradient."""
    inputs = Inputs(*(x.requires_grad_() for x in make_inputs(T)))
    spec = SPEC._replace(context=context, persistent_keys=persistent_keys, update=update, eta_max=ETA[update])
    memory = make_hierarchy(spec)
    leaves = [*inputs, *memory.parameters()]

    def evaluate() -> list[torch.Tensor]:
        y, _ = memory(*inputs)
        total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        return [y, *torch.autograd.grad(total, leaves, materialize_grads=True)]

    fast = evaluate()
    monkeypatch.setattr(hierarchy, "scan_shard", reference.scan_shard)
    monkeypatch.setattr(hierarchy, "project", reference.project)
    assert max(relative_errors(evaluate(), fast)) <= 1e-9
