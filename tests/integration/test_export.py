"""An exported model in a process that does not have this package: the same numbers, the same text; and back again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from atlas_lm.checkpoints.io import AtomicCheckpointIO
from atlas_lm.cli import export as command
from atlas_lm.config.parsing import CONFIG
from atlas_lm.data.tokenizers import ByteTokenizer, load_tokenizer
from atlas_lm.exchange.bundle import bundle, closure, imports_of
from atlas_lm.runs.load import load
from atlas_lm.training.module import AtlasModule
from tests.support import ROOT
from tests.support.model_cases import model_config
from tests.support.rollback_cases import OPTIM

MODELS: dict[str, dict[str, Any]] = {
    "as the default": {
        "network": "linear", "update": "delta", "local_network": "gated_mlp", "local_update": "gradient", "context": 1,
        "share_qkv": True, "attention_conv": 4, "answers": "gated", "memory_layers": [1], "cached_states": 2,
    },
    "quadratic": {"features": "quadratic", "context": 1, "local_chunks": [5, 3]},
    "without memory": {"memory": "none"},
}  # fmt: skip


def make_run(folder: Path, tokenizer: str = "bytes", **changes: Any) -> AtlasModule:
    """A run folder of a model at random weights."""
    torch.manual_seed(0)
    words = load_tokenizer(tokenizer)
    config = model_config(**changes)
    module = AtlasModule(vars(config), OPTIM, words.vocab_size, None, words.fingerprint())
    content = {
        "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 7,
        "local_chunks": list(module.local_chunks), "epoch": 0, "pytorch-lightning_version": "2.6.0", "loops": {},
    }  # fmt: skip
    AtomicCheckpointIO().save_checkpoint(content, folder / "checkpoints" / "step-0000007.ckpt")
    (folder / CONFIG).write_text("name: made\n")
    if tokenizer != "bytes":
        (folder / "tokenizer.json").write_text(words.to_json())  # type: ignore[attr-defined]
    return module


def elsewhere(folder: Path, tokens: torch.Tensor, tmp_path: Path) -> dict[str, Any]:
    """What `load_exported.py` finds, in a process of its own."""
    torch.save(tokens, tmp_path / "tokens.pt")
    script = ROOT / "tests" / "support" / "load_exported.py"
    words = [sys.executable, "-P", str(script), str(folder), str(tmp_path / "tokens.pt"), str(tmp_path / "found.pt")]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=_environment(tmp_path))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "deprecated" not in ended.stderr
    return torch.load(tmp_path / "found.pt", weights_only=True)


def _environment(tmp_path: Path) -> dict[str, str]:
    import os

    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@torch.no_grad()
def greedily(model: Any, tokens: torch.Tensor, count: int) -> torch.Tensor:
    session = model.stream(tokens.size(0))
    logits, found = session.read(tokens)[:, -1], [tokens]
    for _ in range(count):
        found.append(logits.argmax(-1, keepdim=True))
        logits = session.read(found[-1])[:, -1]
    return torch.cat(found, dim=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "tokenizer"), [("as the default", "python"), ("quadratic", "bytes"), ("without memory", "bytes")]
)
def test_another_process_computes_the_same(name: str, tokenizer: str, tmp_path: Path) -> None:
    module = make_run(tmp_path / "run", tokenizer, **MODELS[name])
    command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"])
    model = module.model.float().eval()
    tokens = torch.randint(256, (2, 61), generator=torch.Generator().manual_seed(1))
    found = elsewhere(tmp_path / "out", tokens, tmp_path)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(found["logits"], logits), "bit for bit"
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert torch.equal(found["loss"], loss)
        streamed = model.stream(2).read(tokens)
        assert torch.equal(found["streamed"], streamed)
    ours = greedily(model, tokens, 20)
    end = load_tokenizer(tokenizer).separator_id
    for row, expected in zip(found["greedy"].tolist(), ours.tolist(), strict=True):
        until = expected.index(end, 61) + 1 if end in expected[61:] else len(expected)
        assert row[:until] == expected[:until]
    assert found["beams"].shape[1] <= 69
    text = "def f(x):\n\treturn «x»"
    assert found["ids"] == load_tokenizer(tokenizer).encode(text).tolist()
    assert found["text"] == text
    assert "a memory learns whatever it reads" in found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "43m"])
def test_whole_models_at_random_weights(size: str, tmp_path: Path) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = OmegaConf.to_container(compose("train", [f"model={size}"]).model, resolve=True)
    assert isinstance(settings, dict)
    module = make_run(tmp_path / "run", "python", **{str(name): value for name, value in settings.items()})
    command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"])
    model = module.model.float().eval()
    tokens = torch.randint(2048, (1, 150), generator=torch.Generator().manual_seed(1))
    found = elsewhere(tmp_path / "out", tokens, tmp_path)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(tokens).logits), "bit for bit"
    row, expected = found["greedy"][0].tolist(), greedily(model, tokens, 20)[0].tolist()
    end = load_tokenizer("python").separator_id
    until = expected.index(end, 150) + 1 if end in expected[150:] else len(expected)
    assert row[:until] == expected[:until]


@pytest.mark.parametrize("name", ["as the default", "without memory"])
def test_it_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    module = make_run(tmp_path / "run", "python", **MODELS[name])
    command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"])
    command.main([f"run={tmp_path / 'out'}", "to=run", f"out={tmp_path / 'back'}"])
    model, tokenizer = load(tmp_path / "back")
    for name, weight in module.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert tokenizer.fingerprint() == load_tokenizer("python").fingerprint()
    command.main([f"run={tmp_path / 'back'}", f"out={tmp_path / 'again'}"])
    for name in ("model.safetensors", "config.json", "tokenizer.json", "training.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_the_chunks_that_training_came_to_are_exported(tmp_path: Path) -> None:
    make_run(tmp_path / "run", local_chunks=[8, 4])
    path = tmp_path / "run" / "checkpoints" / "step-0000007.ckpt"
    content = torch.load(path, weights_only=True)
    AtomicCheckpointIO().save_checkpoint({**content, "local_chunks": [2, 1]}, path)
    command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["local_chunks"] == [2, 1]


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="has something in it already: give a new folder"):
        command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'full'}"])
    with pytest.raises(ValueError, match="to=onnx must be one of hf, run, checkpoint"):
        command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "to=onnx"])
    with pytest.raises(ValueError, match="is no folder that export to=hf wrote"):
        command.main([f"run={tmp_path / 'run'}", "to=run", f"out={tmp_path / 'out'}"])
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000007.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="step-0000007"):
        command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()
    monkeypatch.setitem(sys.modules, "transformers", None)
    make_run(tmp_path / "other")
    with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'atlas-lm\[exchange\]'"):
        command.main([f"run={tmp_path / 'other'}", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists(), "whole or absent: the same command can be given again"


def test_a_damaged_export_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    command.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'out'}"])
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged .*: copy it again"):
        command.main([f"run={tmp_path / 'out'}", "to=run", f"out={tmp_path / 'back'}"])
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        command.main([f"run={tmp_path / 'out'}", "to=run", f"out={tmp_path / 'back'}"])


def test_the_bundle_names_no_package_and_all_of_its_files() -> None:
    files = bundle()
    assert len(files) == len(closure()) + 1
    for name, text in files.items():
        assert not imports_of(text), name
        compile(text, name, "exec")
    for name in files:
        if name != "modeling_atlas.py":
            assert f"from .{name.removesuffix('.py')} import " in files["modeling_atlas.py"]
    assert ByteTokenizer.separator_id == 256
