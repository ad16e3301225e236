"""What every update stores, at every chunk size: pairs that come back, gates open, at initialisation.

docs/decisions/0047 has the table.
"""

import pytest
import torch
from torch.nn import functional as nnf

from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.probes import write_and_read
from callbacks.niah_probe import cosines
from tests.support.model_cases import VOCABULARY, model_config

CHUNKS = (pytest.param(1, marks=pytest.mark.slow), 16, 64)


def retrieved(
    network: str, update: str, chunk: int, correlated: bool = False, pairs: int = 100, eta_max: float = 1.0,
    rank: int = 447,
) -> float:  # fmt: skip
    """Mean cosine over all places of a pair, of a sketch of `rank`; keys that share a direction, if asked."""
    torch.manual_seed(0)
    config = model_config(network=network, update=update, head_dim=64, heads=2, rank=rank, dim=16, layers=1, context=1,
                          memory_hidden=64, local_chunks=[chunk], global_chunk=64, shard=128, eta_max=eta_max,
                          )  # fmt: skip
    model = AtlasLM(config, VOCABULARY)
    keys = torch.randn(1, 2, 4, pairs, 64) + (torch.randn(64) if correlated else 0.0)
    keys, values = (nnf.normalize(x, dim=-1) for x in (keys, torch.randn(1, 2, 4, pairs, 64)))
    with torch.no_grad():
        found = [
            cosines(write_and_read(model, keys, values, keys[..., i, :])[:, 1], values[..., i, :]).mean()
            for i in range(0, pairs, 10)
        ]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("network", "least"), [("gated_mlp", 0.84), ("mlp", 0.82), ("linear", 0.87)])
def test_gradients_of_a_chunk(network: str, least: float, chunk: int) -> None:
    assert retrieved(network, "gradient", chunk) >= least


@pytest.mark.parametrize("chunk", CHUNKS)
def test_delta_stores_in_a_chunk_what_it_stores_token_by_token(chunk: int) -> None:
    found = retrieved("linear", "delta", chunk)
    assert found >= 0.92
    assert found == pytest.approx(retrieved("linear", "delta", 1), abs=1e-5), "as token by token"


@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_the_default_stores(chunk: int) -> None:
    assert retrieved("linear", "delta", chunk, rank=575) >= 0.93
    assert retrieved("linear", "delta", chunk, True, rank=575) >= 0.55


def test_correlated_pairs_come_back_better_than_by_gradients_of_a_chunk() -> None:
    assert retrieved("linear", "delta", 64, True) > 1.25 * retrieved("linear", "gradient", 64, True)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("network", "eta_max", "least"), [("linear", 1.0, 0.8), ("gated_mlp", 0.3, 0.75)])
def test_newton_schulz_holds_its_whole_chunk(network: str, eta_max: float, least: float, chunk: int) -> None:
    """With the momentum of single tokens it held the last two of 64: 0.03 of these 64 pairs."""
    assert retrieved(network, "newton_schulz", chunk, pairs=64, eta_max=eta_max) >= least
