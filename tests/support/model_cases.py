"""Small whole models at sizes that divide nothing, their tokens, and streams through them."""

import torch

from atlas_lm.config.model import ModelConfig
from atlas_lm.model.atlas import AtlasLM

VOCABULARY = 11


def model_config(**changes) -> ModelConfig:
    """Two layers at sizes that divide nothing."""
    values = dict(
        name="small", dim=10, layers=2, heads=2, head_dim=4, window=5, ffn_multiple=2.0, fusion="multiplicative",
        memory="atlas", local_chunks=[3, 7], global_chunk=8, shard=24, network="gated_mlp", residual=False,
        features="sketch", rank=6, memory_hidden=5, context=4, update="gradient", persistent_keys=3, eta_max=1.0,
        half_life=64.0, radius=8.0, conv=4, reset_at_document=False, polarisation_cap=0.1,
        rope_base=10000.0,
    )  # fmt: skip
    return ModelConfig(**(values | changes))


def build_model(dtype=torch.float64, **changes) -> AtlasLM:
    torch.manual_seed(0)
    return AtlasLM(model_config(**changes), VOCABULARY).to(dtype)


def make_tokens(T: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, T), generator=torch.Generator().manual_seed(seed))


def stream_model(model: AtlasLM, tokens, ends):
    state, logits, states = model.initial_state(tokens.size(0)), [], []
    for start, end in zip([0, *ends], ends, strict=False):
        out = model(tokens[:, start:end], state)
        state = out.state
        logits.append(out.logits)
        states.append(state)
    return torch.cat(logits, dim=1), states


def build(**changes) -> AtlasLM:
    """A float32 model without an Omega window, at the seed as it is."""
    return AtlasLM(model_config(**({"context": 1} | changes)), VOCABULARY)
