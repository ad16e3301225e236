"""The models that are trained on GPUs, at a width that a CPU can build: do their memories hold a needle at first?"""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from atlas_lm.config.model import ModelConfig
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.probes import write_and_read
from callbacks.niah_probe import NiahProbe, cosines
from tests.support import ROOT
from tests.support.model_cases import model_config

SIZES = sorted(path.stem for path in (ROOT / "conf" / "model").glob("[!_]*.yaml"))


def config_of(size: str) -> ModelConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        found = OmegaConf.to_object(compose("train", overrides=["+experiment=stage1", f"model={size}"]).model)
    assert isinstance(found, ModelConfig)
    return found


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[] if size in ("43m", "1300m") else pytest.mark.slow) for size in SIZES]
)
@torch.no_grad()
def test_a_needle_is_found_after_100_pairs(size: str) -> None:
    """What a memory holds depends on its own sizes; the model's width and depth open gates, which stand open here."""
    torch.manual_seed(0)
    config = ModelConfig(**{**vars(config_of(size)), "dim": 16, "layers": 1, "heads": 2, "memory_layers": None})
    model = AtlasLM(config, 11)
    keys, values = NiahProbe(needles=8).pairs(1, 2, config.head_dim)
    found = write_and_read(model, keys, values, keys[..., 0, :])
    by_memory = cosines(found, values[:, None, ..., 0, :]).mean(dim=(0, 2, 3))
    assert by_memory.min() >= 0.8, by_memory


@pytest.mark.parametrize("network", ["gated_mlp", "mlp"])
def test_a_memory_narrower_than_its_head_is_refused(network: str) -> None:
    """What it answers would lie in a subspace: a needle of 256 channels came back with a cosine of 0.255."""
    with pytest.raises(ValueError, match=r"model\.memory_hidden=3.*a memory's head, 4"):
        model_config(network=network, memory_hidden=3)
    model_config(network=network, memory_hidden=4)
    model_config(network="linear", memory_hidden=3)  # it has none
    with pytest.raises(ValueError, match=r"model\.memory_hidden=5.*a memory's head, 8"):  # one for both heads
        model_config(network=network, memory_hidden=5, heads=2, memory_heads=1)


def test_heads_of_a_memory_that_do_not_share_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.memory_heads=3 must divide .* = 8: choose a divisor, or null"):
        model_config(heads=2, memory_heads=3)
