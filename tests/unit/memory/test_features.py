"""Feature maps, and the capacity that they buy: a needle in a haystack at initialisation (M1, N1)."""

from math import comb

import pytest
import torch
from torch.nn import functional as nnf

from atlas_lm.memory.chunked import scan
from atlas_lm.memory.fast_memory import FastMemory, MemorySpec
from atlas_lm.memory.features import Monomials, Sketch, build_features, monomial_weights
from atlas_lm.memory.state import Gates, Tokens, initial_state


def unit(*shape: int) -> torch.Tensor:
    return nnf.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("kind", ["linear", "quadratic", "sketch"])
def test_unit_vectors_get_unit_norm(kind):
    torch.manual_seed(0)
    features = build_features(kind, 16, 40).double()
    phi = features(unit(3, 50, 16))
    assert phi.shape == (3, 50, features.dim_out)
    torch.testing.assert_close(phi.norm(dim=-1), torch.ones(3, 50, dtype=torch.float64))


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("dim", [1, 2, 7, 16])
def test_monomials_are_all_of_them_and_their_kernel_is_the_polynomial(dim, degree):
    torch.manual_seed(0)
    features, x, y = Monomials(dim, degree), torch.randn(20, dim).double(), torch.randn(20, dim).double()
    assert features.dim_out == comb(dim + degree, degree) == features(x).size(-1)
    weights = monomial_weights(degree)
    assert sum(weights) == pytest.approx(1.0)
    kernel = sum(w * (x @ y.mT) ** p for p, w in enumerate(weights))
    torch.testing.assert_close(features(x) @ features(y).mT, kernel)


def test_sketch_has_the_features_it_promises():
    assert build_features("sketch", 64, 447).dim_out == 512
    assert len(list(Sketch(4, 5).parameters())) == 2


def test_features_that_do_not_exist():
    with pytest.raises(ValueError, match="degree must be 1 or 2, got 3"):
        Monomials(4, 3)
    with pytest.raises(ValueError, match=r"rank of a feature sketch .* 0"):
        build_features("sketch", 4, 0)
    with pytest.raises(ValueError, match=r"'fourier'.* linear, quadratic or sketch"):
        build_features("fourier", 4, 5)


# N1: one needle, then a haystack of 100, d = 64, at initialisation, every write at full strength.

HEADS, DIM, HAYSTACK = 8, 64, 100


@torch.inference_mode()
def needle_score(seed: int, chunk: int, write_needle: bool = True, **changes) -> float:
    """Cosine of what the needle's key retrieves and the needle's value, mean over the heads: independent trials."""
    torch.manual_seed(seed)
    spec = MemorySpec(dim=8, heads=HEADS, head_dim=DIM, local_chunks=(), global_chunk=1, shard=1)._replace(**changes)
    features = build_features(spec.features, DIM, spec.rank)
    memory = FastMemory(spec, chunk, "token", features)
    T = 1 + HAYSTACK
    k, v = (nnf.normalize(torch.randn(1, HEADS, T, DIM), dim=-1) for _ in range(2))
    one = torch.ones(1, HEADS, T)
    gamma = one.clone()
    gamma[..., 0] = float(write_needle)
    q = k[:, :, :1].expand_as(k)
    state = initial_state(memory.rule, memory.weights(), 1, features.dim_out)
    tokens = Tokens(k, features(k), v, Gates(alpha=one, eta=one, theta=0 * one, gamma=gamma))
    y, _ = scan(memory.rule, state, memory.weights(), q, features(q), tokens)
    return nnf.cosine_similarity(y[:, :, -1], v[:, :, 0], dim=-1).mean().item()


LINEAR = {"network": "linear", "features": "linear"}
CHUNKS = (1, 16, 32, 1 + HAYSTACK)
SEEDS = (0, 1, 2)


def test_linear_features_score_what_crosstalk_predicts():
    """In one chunk every pair is written alike: the needle is 1, each straw κ: cos = 1 / √(1 + 100 E[κ²])."""
    constant, linear = monomial_weights(1)
    square = constant**2 + linear**2 / DIM  # E[κ²] of κ = w₀ + w₁ x·y for random unit vectors
    predicted = (1 + HAYSTACK * square) ** -0.5
    scores = [needle_score(seed, 1 + HAYSTACK, **LINEAR) for seed in range(10)]
    assert sum(scores) / len(scores) == pytest.approx(predicted, abs=0.05)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_linear_features_lose_the_needle(seed, chunk):
    assert needle_score(seed, chunk, **LINEAR) < 0.8


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_default_features_find_the_needle(seed, chunk):
    assert needle_score(seed, chunk) >= 0.8


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("changes", [LINEAR, {}], ids=["linear", "default"])
def test_a_needle_that_was_not_written_is_not_found(changes, chunk):
    scores = [needle_score(seed, chunk, write_needle=False, **changes) for seed in SEEDS]
    assert abs(sum(scores) / len(scores)) < 0.1
