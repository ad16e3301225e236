"""`update: delta`: the reference one token at a time, and what it stores."""

import pytest
import torch
from torch.nn import functional as nnf

from atlas_lm.memory import chunked, reference
from atlas_lm.memory.network import build_network
from atlas_lm.memory.state import Rule, check_rule
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.probes import write_and_read
from callbacks.niah_probe import cosines
from tests.support.memory_cases import everything, gradients, make_case, relative_errors, run
from tests.support.model_cases import VOCABULARY, model_config


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


def retrieved(chunk: int, correlated: bool, update: str, pairs: int = 100, needles: int = 4) -> float:
    """Mean cosine over all places of a pair, gates open, the default sketch; keys that share a direction, if asked."""
    torch.manual_seed(0)
    config = model_config(network="linear", update=update, head_dim=64, heads=2, rank=447, dim=16, layers=1, context=1,
                          memory_hidden=64, local_chunks=[chunk], global_chunk=64, shard=128)  # fmt: skip
    model = AtlasLM(config, VOCABULARY)
    keys = torch.randn(1, 2, needles, pairs, 64) + (torch.randn(64) if correlated else 0.0)
    keys, values = (nnf.normalize(x, dim=-1) for x in (keys, torch.randn(1, 2, needles, pairs, 64)))
    with torch.no_grad():
        found = [
            cosines(write_and_read(model, keys, values, keys[..., i, :])[:, 1], values[..., i, :]).mean()
            for i in range(0, pairs, 3)
        ]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_random_pairs_come_back_whatever_the_chunk(chunk: int) -> None:
    """What single tokens store a chunk of 64 stores."""
    assert retrieved(chunk, False, "delta") >= 0.92
    assert retrieved(chunk, False, "delta") == pytest.approx(retrieved(1, False, "delta"), abs=1e-5)


def test_correlated_pairs_come_back_better_than_by_gradients_of_a_chunk() -> None:
    assert retrieved(64, True, "delta") > 1.25 * retrieved(64, True, "gradient")
