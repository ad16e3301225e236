"""The count of a step's memory, against what PyTorch keeps in a real one."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as nnf

from atlas_lm.config.model import ModelConfig
from atlas_lm.memory.host_reads import as_on_a_gpu
from atlas_lm.memory.loop import triton as triton_loop
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.training.budget import USABLE, Budget, budget, largest_batch
from tests.support.model_cases import model_config
from tests.unit.training.test_optimizer import optim_config

VOCABULARY, ROWS, LENGTH = 300, 2, 96
SMALL = {
    "without memory": {"memory": "none"},
    "deep": {},
    "delta and deep": {"network": "linear", "update": "delta", "local_network": "gated_mlp",
                       "local_update": "gradient", "share_qkv": True, "answers": "gated"},
    "newton_schulz": {"update": "newton_schulz"},
}  # fmt: skip


def small(name: str = "deep", **changes) -> ModelConfig:
    sizes = {
        "dim": 32, "heads": 2, "head_dim": 16, "memory_hidden": 16, "rank": 15, "window": 16, "context": 1,
        "local_chunks": [16], "global_chunk": 32, "shard": 96,
    }  # fmt: skip
    return model_config(**{**sizes, **SMALL[name], **changes})


def kept(config: ModelConfig) -> int:
    """Bytes that a real forward pass keeps for the way back, each storage once, without the parameters'."""
    torch.manual_seed(0)
    net = AtlasLM(config, VOCABULARY)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    with as_on_a_gpu(), saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        logits = net(tokens).logits
        nnf.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    return sum(size for size, _ in seen.values())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "triton"),
    [(name, triton) for name in SMALL for triton in (True, False) if (name, triton) != ("newton_schulz", True)],
)
def test_activations_are_those_of_a_real_step(name, triton, monkeypatch):
    if not triton:
        monkeypatch.setattr(triton_loop, "can_run", lambda *_: False)
    counted = budget(small(name), optim_config(), VOCABULARY, ROWS, LENGTH)
    assert counted.activations == pytest.approx(kept(small(name)), rel=0.1)
    assert (counted.kept_states > 0) == (name != "without memory")


def test_weights_gradients_and_moments():
    found = budget(small(), optim_config(name="adamw"), VOCABULARY, 1, LENGTH)
    numbers = sum(p.numel() for p in AtlasLM(small(), VOCABULARY).parameters() if p.requires_grad)
    assert found.weights == pytest.approx(4 * numbers, rel=0.05)
    assert found.gradients == 4 * numbers
    assert found.moments == pytest.approx(8 * numbers, rel=0.01)
    assert found.peak > found.weights + found.moments + found.activations
    assert found.lasting == found.weights + found.gradients + found.moments


def test_fast_weights_that_are_kept_are_counted():
    """About the root of the chunks, by the shapes that they have: W − W_init above S."""
    found = budget(small(local_chunks=[2], global_chunk=96, layers=1), optim_config(), VOCABULARY, ROWS, LENGTH)
    hierarchy = next(AtlasLM(small(), VOCABULARY).hierarchies())
    local = hierarchy.memories()[-1]
    one = 4 * ROWS * 2 * sum(w.numel() for w in local.weights())
    chunks = LENGTH // 2
    assert found.kept_states >= one * chunks**0.5 * 0.9
    assert found.kept_states < one * chunks / 2


@pytest.mark.long
def test_checkpointing_keeps_less():
    whole, less = (
        budget(dataclasses.replace(small(layers=3), checkpoint=kind), optim_config(), VOCABULARY, ROWS, LENGTH)
        for kind in ("none", "block")
    )
    assert less.activations < 0.6 * whole.activations
    assert less.peak < whole.peak


def test_a_batch_twice_as_large_keeps_twice_as_much():
    one, two = (budget(small(), optim_config(), VOCABULARY, rows, LENGTH) for rows in (1, 2))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.05)
    assert two.weights == one.weights
    card = two.peak + 0.5 * (one.peak - one.lasting)  # half a sequence more than two
    assert largest_batch(one, 1, card / USABLE) == 2


def test_the_largest_batch():
    found = Budget(10, 10, 20, 40, 0, 100)  # 40 last, 60 for two sequences
    assert largest_batch(found, 2, 131 / USABLE) == 3
    assert largest_batch(found, 2, 69 / USABLE) == 0
    assert largest_batch(found, 2, 111 / USABLE, sharded_over=2) == 3
