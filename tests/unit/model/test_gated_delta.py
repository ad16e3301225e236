"""The gated delta net as a baseline: as large as ours, a memory that reads, restarts, freezes and streams."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn import functional as nnf

from atlas_lm.memory import gated_delta
from atlas_lm.model.atlas import AtlasLM, parameters_of
from atlas_lm.model.gated_delta import GatedDeltaBranch, spec_of_state
from atlas_lm.model.probes import losses_after_restarts
from atlas_lm.model.session import Session
from tests.support import ROOT
from tests.support.model_cases import VOCABULARY, build, make_tokens


@pytest.fixture
def model() -> AtlasLM:
    torch.manual_seed(0)
    return build(memory="gated_delta").eval()


def branches(model: AtlasLM) -> list[GatedDeltaBranch]:
    found = [block.memory for block in model.blocks]
    assert all(isinstance(memory, GatedDeltaBranch) for memory in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("size", ["tiny", "tiny_deep", "43m", "125m", "340m", "760m", "1300m"])
def test_baselines_have_the_parameters_of_the_model_with_memory(size: str) -> None:
    counts = {}
    for memory in ("atlas", "gated_delta", "none"):
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")), torch.device("meta"):
            cfg = compose("train", overrides=["+experiment=stage1", f"model={size}", f"model.memory={memory}"])
            counts[memory] = parameters_of(AtlasLM(OmegaConf.to_object(cfg.model), 257))  # type: ignore[arg-type]
    assert counts["gated_delta"] == pytest.approx(counts["atlas"], rel=0.01)
    assert counts["none"] == pytest.approx(counts["atlas"], rel=0.01)


def test_its_state_is_as_large_as_our_fast_weights(model: AtlasLM) -> None:
    ours = build()
    for branch, hierarchy in zip(branches(model), ours.hierarchies(), strict=True):
        fast = sum(weight.numel() for memory in hierarchy.memories() for weight in memory.weights())
        assert branch.initial_state(1).numel() == pytest.approx(fast, rel=0.05)


@pytest.mark.parametrize("numbers", [1, 7, 1000, 278_528, 4_000_000])
def test_the_sizes_hold_as_many_numbers(numbers: int) -> None:
    spec = spec_of_state(8, 8, numbers)
    assert spec.heads * spec.key * spec.value == pytest.approx(numbers, rel=0.05, abs=3)
    assert spec.key <= 256, "what fused kernels take"


def test_a_stream_reads_what_the_whole_sequence_reads(model: AtlasLM) -> None:
    tokens = make_tokens(150)
    with torch.no_grad():
        expected = model(tokens).logits
    session = model.stream(2)
    found = torch.cat([session.read(part) for part in tokens.tensor_split([1, 70, 71], dim=1)], dim=1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_no_token_sees_a_later_one(model: AtlasLM) -> None:
    tokens = make_tokens(90)
    other = tokens.clone()
    other[:, 60:] = (other[:, 60:] + 1) % VOCABULARY
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[:, :60], model(other).logits[:, :60])


def test_it_is_restarted_and_frozen(model: AtlasLM) -> None:
    tokens = make_tokens(100)
    losses = losses_after_restarts(model, tokens[:, :-1], tokens[:, 1:], [0, 80], 10)
    assert (losses[0] - losses[-1]).abs().max() > 1e-4, "with its past the loss is another one"
    session = model.stream(2)
    session.read(tokens[:, :50])
    before = [block.memory for block in session.state]
    session.read(tokens[:, 50:], write=False)
    assert all(torch.equal(a, block.memory) for a, block in zip(before, session.state, strict=True))


def test_a_session_continues_from_a_file(model: AtlasLM, tmp_path) -> None:
    tokens = make_tokens(60)
    session = model.stream(2)
    session.read(tokens[:, :40])
    session.save(tmp_path / "state.pt")
    assert torch.equal(Session.load(model, tmp_path / "state.pt").read(tokens[:, 40:]), session.read(tokens[:, 40:]))


def test_a_state_of_ours_does_not_fit(model: AtlasLM) -> None:
    with pytest.raises(ValueError, match="state"):
        model(make_tokens(5), build().initial_state(2))
    with pytest.raises(ValueError, match="state"):
        build()(make_tokens(5), model.initial_state(2))


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = build(memory="gated_delta")
    tokens = make_tokens(80)
    nnf.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_its_gates_open_alike_under_autocast(model: AtlasLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as our gates do: in bfloat16 its half-lives would be steps."""
    opened: list[torch.Tensor] = []
    scan = gated_delta.scan

    def noted(q, k, v, alpha, beta, state):
        opened.append(torch.stack([alpha, beta]))
        return scan(q, k, v, alpha, beta, state)

    monkeypatch.setattr(gated_delta, "scan", noted)
    branch, x = branches(model)[0], torch.randn(2, 7, 10)
    for low in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            branch(x, branch.initial_conv(2), None, None)
    assert torch.equal(*opened)
