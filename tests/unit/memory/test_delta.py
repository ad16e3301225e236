"""`update: delta` against the reference, one token at a time."""

import pytest

from atlas_lm.memory import chunked, reference
from atlas_lm.memory.network import build_network
from atlas_lm.memory.state import Rule, check_rule
from tests.support.memory_cases import everything, gradients, make_case, relative_errors, run


def rule_of(residual: bool = False) -> Rule:
    return Rule(build_network("linear", residual), 7, update="delta")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("restarts", [(), (0, 5, 70)])
@pytest.mark.parametrize("T", [1, 7, 64, 130])
def test_it_is_the_reference(T: int, restarts: tuple[int, ...], residual: bool) -> None:
    case, rule = make_case("linear", T, restarts=restarts), rule_of(residual)
    truth, fast = run(reference, rule, case), run(chunked, rule, case)
    assert max(relative_errors(everything(truth), everything(fast))) <= 1e-11
    ours, theirs = (gradients(result, case) for result in (fast, truth))
    assert max(relative_errors(theirs, ours)) <= 1e-10


@pytest.mark.parametrize("cuts", [(1,), (30, 31), (64, 100)])
def test_calls_may_cut_the_tokens_anywhere(cuts: tuple[int, ...]) -> None:
    case, rule = make_case("linear", 130), rule_of()
    whole, pieces = run(chunked, rule, case), run(chunked, rule, case, cuts)
    assert max(relative_errors(everything(whole), everything(pieces))) <= 1e-11
    assert pieces[1].momentum == ()
    assert pieces[1].tail.k.size(2) == 0, "no unfinished chunk"


@pytest.mark.parametrize(("network", "context"), [("gated_mlp", 1), ("mlp", 1), ("linear", 2)])
def test_it_is_for_linear_memories(network: str, context: int) -> None:
    with pytest.raises(ValueError, match=f"got network {network} and context {context}"):
        check_rule(Rule(build_network(network, False), 7, context=context, update="delta"))
