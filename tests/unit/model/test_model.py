"""Sizes of the model configs, and the parts around the memory: attention, RoPE, convolution (M12)."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch.nn import functional as nnf

from atlas_lm.config.model import ModelConfig
from atlas_lm.model.atlas import AtlasLM, check
from atlas_lm.model.attention import SlidingWindowAttention, rotate, window_attention
from atlas_lm.model.block import Fusion
from atlas_lm.model.convolution import CausalConv
from atlas_lm.model.probes import attention_reach
from tests.support import ROOT

CONF = ROOT / "conf"
VOCABULARY = 32_000

# at a vocabulary of 32,000 tokens
PARAMETERS = {
    "tiny": 11_064_528,
    "tiny_deep": 10_433_440,
    "43m": 47_659_824,
    "125m": 155_974_416,
    "340m": 484_081_536,
    "760m": 1_029_859_392,
    "1300m": 1_389_274_896,
}


def model_config(name: str, **changes) -> ModelConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", overrides=[f"model={name}"]).model
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return ModelConfig(**{**values, **changes})


def parameter_count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AtlasLM(config, VOCABULARY).parameters())


def test_every_model_config_is_in_the_table():
    others = {"latent", "latent_memory"}  # of vectors, without a vocabulary: tests/unit/latent
    assert {path.stem for path in (CONF / "model").glob("[!_]*.yaml")} == set(PARAMETERS) | others


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert parameter_count(model_config(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_twin_without_memory_is_as_large(name):
    twin = parameter_count(model_config(name, memory="none"))
    assert twin == pytest.approx(parameter_count(model_config(name)), rel=0.005)


LEVERS = [
    {"memory_layers": [1]},
    {"global_chunk": None},
    {"share_qkv": True},
    {"attention_conv": 4},
    {"memory_layers": [0], "global_chunk": None, "share_qkv": True, "attention_conv": 4, "network": "linear"},
]


@pytest.mark.parametrize("memory", ["none", "gated_delta"])
@pytest.mark.parametrize("levers", LEVERS, ids=str)
def test_twins_are_as_large_with_every_lever(levers, memory):
    ours, twin = (parameter_count(model_config("tiny_deep", **levers, memory=m)) for m in ("atlas", memory))
    assert twin == pytest.approx(ours, rel=0.01)


def test_memory_lies_in_the_named_blocks_alone():
    model = AtlasLM(model_config("tiny_deep", layers=3, dim=16, head_dim=4, memory_layers=[0, 2]), 11)
    assert [block.memory is None for block in model.blocks] == [False, True, False]
    assert len(model(torch.randint(11, (2, 20))).gates) == 2


def test_without_a_global_memory_local_ones_answer():
    changes = {"dim": 16, "head_dim": 4, "local_chunks": [4], "global_chunk": None}
    model = AtlasLM(model_config("tiny_deep", **changes), 11)
    assert not any("global_memory" in name for name, _ in model.named_parameters())
    memory = model.blocks[0].memory
    seen = []
    memory.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(torch.randint(11, (2, 20)))
    assert seen[0].abs().max() > 0


def test_shared_projections_are_the_attention_s_and_learn_from_the_memory():
    model = AtlasLM(model_config("tiny_deep", dim=16, head_dim=4, share_qkv=True, attention_conv=4), 11)
    branch = model.blocks[0].memory
    assert branch.qkv is None
    assert branch.conv is None
    given = {}
    branch.hierarchy.register_forward_pre_hook(lambda module, args: given.update(q=args[1], k=args[2], v=args[3]))
    x = torch.randn(2, 20, 16)
    qkv, _ = model.blocks[0].attention.project(x, None)
    y, _, _ = branch(x, None, None, None, qkv_BTM=qkv)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    for name, expected in {"q": nnf.normalize(q, dim=-1), "k": nnf.normalize(k, dim=-1), "v": v}.items():
        torch.testing.assert_close(given[name], expected)
    y.square().sum().backward()
    assert model.blocks[0].attention.qkv.weight.grad.abs().amax(1).min() > 0  # of q, of k and of v


def test_attention_with_a_convolution_finds_what_followed_its_token():
    """ "a b … a": of all keys the last token's query fits that of b best, but for those that hold a itself."""
    torch.manual_seed(0)
    attention = SlidingWindowAttention(128, 1, 128, 64, 1e4, 2)
    x = torch.randn(50, 40, 128)
    x[:, -1] = x[:, 9]
    q, k, _ = attention.project(x, None)[0].chunk(3, dim=-1)
    scores = (k @ q[:, -1].unsqueeze(-1)).squeeze(-1)
    scores[:, [9, 39]] = -torch.inf
    assert (scores.argmax(-1) == 10).float().mean() > 0.9
    plain = SlidingWindowAttention(128, 1, 128, 64, 1e4)
    q, k, _ = plain.project(x, None)[0].chunk(3, dim=-1)
    assert ((k @ q[:, -1].unsqueeze(-1)).squeeze(-1).argmax(-1) == 10).float().mean() < 0.2


def test_reach_counts_windows_and_convolutions():
    """A change as far back as `attention_reach` moves the last logits, one token further none."""
    for conv in (1, 3):
        config = model_config("tiny_deep", dim=16, head_dim=4, window=5, memory="none", attention_conv=conv)
        model, tokens = AtlasLM(config, 11).double(), torch.randint(11, (1, 40))
        reach = attention_reach(config)
        truth = model(tokens).logits[:, -1]
        for back, moves in ((reach, True), (reach + 1, False)):
            other = tokens.clone()
            other[0, 39 - back] = (other[0, 39 - back] + 1) % 11
            assert bool((model(other).logits[:, -1] - truth).abs().max() > 0) == moves


def test_twin_has_no_memory():
    config = model_config("tiny_deep", memory="none", dim=16, head_dim=4, window=8)
    model = AtlasLM(config, 11)
    output = model(torch.randint(11, (2, 20)))
    assert output.gates == ()
    assert model.local_chunks == ()
    assert not any("memory" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "model.dim"),
        ({"layers": 0}, "model.layers"),
        ({"heads": 0}, "model.heads"),
        ({"head_dim": 0}, "model.head_dim"),
        ({"memory_hidden": 0}, "model.memory_hidden"),
        ({"head_dim": 7}, "model.head_dim must be even for rotary positions, got 7"),
        ({"ffn_multiple": 0.0}, "model.ffn_multiple must be positive, got 0.0"),
    ],
)
def test_sizes_that_no_model_can_have(change, message):
    config = model_config("tiny_deep")
    for name, value in change.items():
        setattr(config, name, value)  # past the checks of ModelConfig itself
    with pytest.raises(ValueError, match=message):
        check(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": 100, "global_chunk": 128}, "shard 100 and global_chunk 128"),
        ({"window": 0}, "model.window=0 must be at least 1"),
        ({"conv": 0}, "model.conv=0 must be at least 1"),
        ({"fusion": "sum"}, "model.fusion=sum must be one of multiplicative"),
        ({"memory": "titans"}, "model.memory=titans must be one of atlas, gated_delta, none"),
        ({"memory_layers": []}, r"model.memory_layers=\[\] must name blocks from 0 to 1, each once"),
        ({"memory_layers": [2]}, r"model.memory_layers=\[2\] must name blocks from 0 to 1"),
        ({"memory_layers": [1, 1]}, r"model.memory_layers=\[1, 1\] must name"),
        ({"attention_conv": 0}, "model.attention_conv=0 must be at least 1"),
        ({"global_chunk": 0}, "model.global_chunk=0 must be at least 1"),
        ({"global_chunk": None, "local_chunks": []}, r"local_chunks=\[\] leave no memory"),
    ],
)
def test_values_that_no_model_can_have(change, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        AtlasLM(model_config("tiny_deep", **change), 11)


def test_parts_refuse_widths_below_one():
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        SlidingWindowAttention(8, 2, 4, 0, 1e4)
    with pytest.raises(ValueError, match="got 0"):
        CausalConv(8, 0)


def test_chunk_sizes_are_set_in_every_layer():
    model = AtlasLM(model_config("tiny_deep", layers=2, dim=16, head_dim=4, local_chunks=[2, 3]), 11)
    model.set_local_chunks([5, 9])
    assert model.local_chunks == (5, 9)
    assert [block.memory.hierarchy.local_chunks for block in model.blocks] == [(5, 9)] * 2


# Attention.


def naive_attention(q, k, v, window: int, cached: int = 0):
    """Token t sees itself and the `window` − 1 before it; the first `cached` keys belong to earlier tokens."""
    T, S = q.size(2), k.size(2)
    t, s = torch.arange(T)[:, None] + cached, torch.arange(S)[None]
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill((s > t) | (s <= t - window), -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window", [1, 2, 5, 16, 200])
@pytest.mark.parametrize("T", [1, 7, 63, 100])
def test_window_attention_is_masked_attention(T, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 4, dtype=torch.float64) for _ in range(3))
    empty = torch.full((2, 3, window - 1, 4), 1e3, dtype=torch.float64)  # slots that hold no token must not be seen
    valid = torch.cat([torch.zeros(window - 1, dtype=torch.bool), torch.ones(T, dtype=torch.bool)])
    y = window_attention(q, torch.cat([empty, k], 2), torch.cat([empty, v], 2), valid, window)
    torch.testing.assert_close(y, naive_attention(q, k, v, window))


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("ends", [[63], [1, 2, 63], [30, 31, 32, 63], [3, 50, 63]])
def test_attention_with_its_cache_is_masked_attention_over_everything(window, ends):
    torch.manual_seed(0)
    layer = SlidingWindowAttention(6, 2, 4, window, 1e4).double()
    x = torch.randn(2, 63, 6, dtype=torch.float64)
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in layer.qkv(x).chunk(3, dim=-1))
    truth = naive_attention(rotate(q, 0, 1e4), rotate(k, 0, 1e4), v, window).transpose(1, 2).flatten(2)
    state, outputs = layer.initial_state(2), []
    for start, end in zip([0, *ends], ends, strict=False):
        y, state = layer(x[:, start:end], state)
        outputs.append(y)
        assert state.k.size(2) == window - 1
        assert state.position == end
    torch.testing.assert_close(torch.cat(outputs, 1), truth)


def test_rotary_positions_are_relative_and_keep_norms():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))

    def score(i: int, j: int) -> float:
        return (rotate(q, i, 1e4) * rotate(k, j, 1e4)).sum().item()

    assert score(5, 2) == pytest.approx(score(1005, 1002))
    assert score(5, 2) != pytest.approx(score(5, 3))
    torch.testing.assert_close(rotate(q, 123, 1e4).norm(), q.norm())
    assert torch.equal(rotate(q, 0, 1e4), q)
    row = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(rotate(row, 4, 1e4)[:, :, 3:], rotate(row[:, :, 3:], 7, 1e4))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_streams_and_is_causal(width):
    torch.manual_seed(0)
    conv = CausalConv(3, width).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    zeros = x.new_zeros(2, width - 1, 3)
    whole, tail = conv(x, zeros)
    padded = torch.cat([zeros, x], 1).mT
    truth = torch.nn.functional.conv1d(padded, conv.weight.mT.unsqueeze(1), groups=3).mT
    torch.testing.assert_close(whole, truth)
    outputs, state = [], zeros
    for start, end in ((0, 1), (1, 3), (3, 3 + 9), (12, 20)):
        y, state = conv(x[:, start:end], state)
        outputs.append(y)
        assert state.shape == zeros.shape
    assert torch.equal(torch.cat(outputs, 1), whole)
    assert torch.equal(state, tail)
    changed = x.clone()
    changed[:, 10] += 1
    assert torch.equal(conv(changed, zeros)[0][:, :10], whole[:, :10])
    assert torch.equal(conv(changed, zeros)[0][:, 10 + width :], whole[:, 10 + width :])


def test_an_unknown_fusion_is_refused_by_the_config_before_it_is_built():
    with pytest.raises(ValueError, match="did you mean 'convex'"):
        model_config("tiny_deep", fusion="convexx")
    assert Fusion("convex", 8).kind == "convex"


# Built on device meta.


@pytest.mark.parametrize(
    "changes", [{}, {"memory": "none"}, {"features": "quadratic"}, {"fusion": "normalised_product", "network": "mlp"}]
)
def test_a_model_from_device_meta_is_initialised_as_a_new_one(changes):
    sizes = {"layers": 2, "dim": 16, "head_dim": 4, "rank": 6, "memory_hidden": 5, "window": 8, **changes}
    config = model_config("tiny_deep", **sizes)
    torch.manual_seed(1)
    truth = AtlasLM(config, 11)
    with torch.device("meta"):
        model = AtlasLM(config, 11)
    model = model.to_empty(device="cpu")
    for x in [*model.parameters(), *model.buffers()]:
        x.data.fill_(torch.nan if x.is_floating_point() else 10**9)
    for part in model.modules():  # any order gives every tensor values
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert all(x.isfinite().all() and (x < 10**9).all() for x in [*model.parameters(), *model.buffers()])
    torch.manual_seed(1)
    model.initialise()
    assert all(torch.equal(a, b) for a, b in zip(truth.parameters(), model.parameters(), strict=True))
    tokens = torch.randint(11, (2, 20))
    assert torch.equal(model(tokens).logits, truth(tokens).logits)


@pytest.mark.parametrize("changes", [{}, {"memory": "none"}, {"update": "newton_schulz"}, {"reset_at_document": True}])
def test_a_forward_pass_on_device_meta_gives_shapes(changes):
    config = model_config("tiny_deep", layers=2, dim=16, head_dim=4, rank=6, memory_hidden=5, window=8, **changes)
    with torch.device("meta"):
        model = AtlasLM(config, 11)
        output = model(torch.zeros(2, 70, dtype=torch.long), model.initial_state(2))
        logits = model(torch.zeros(2, 70, dtype=torch.long)).logits
        logits.sum().backward()
    assert output.logits.shape == logits.shape == (2, 70, 11)
    assert logits.device.type == "meta"
